"""Kernels for attention output and column maxima without storing the N x N matrix, which torch does not provide.

Selected by name with ``prune_(..., attention_kernel=...)``, never automatically. "eager" is torch's own operations
(:mod:`cpvit.attention`). "triton" (:mod:`cpvit.kernels.triton_attention`) is for CUDA.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, TypeAlias

import torch

from cpvit.attention import ScoredAttention

KernelName: TypeAlias = Literal["eager", "triton"]


def kernel_named(name: str, device: torch.device) -> ScoredAttention | None:
    """The kernel of this name for this device; None means torch's own operations.

    Raises:
        ValueError: No such kernel, or it cannot run here.
    """
    if name == "eager":
        return None
    if name != "triton":
        raise ValueError(f"attention_kernel must be one of {', '.join(KernelName.__args__)}, got {name!r}")  # type: ignore[attr-defined]
    if device.type != "cuda":
        raise ValueError(
            f"attention_kernel='triton' needs a CUDA device and the model is on {device}; move it first "
            "(model.to('cuda')), or leave attention_kernel='eager'"
        )
    if find_spec("triton") is None:
        raise ValueError(
            "attention_kernel='triton' needs the triton package, which is not installed; pip install triton, or "
            "leave attention_kernel='eager'"
        )
    from cpvit.kernels.triton_attention import scored_attention  # triton may be absent

    return scored_attention
