"""Peak memory of a forward pass and of the process."""

from __future__ import annotations

import os
import sys
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

MIB = 1 << 20
KEEPS_PEAKS = ("cuda", "xpu")
"""Devices whose allocator remembers the most it has given out."""


@torch.inference_mode()
def peak_memory_mib(model: nn.Module, images: Tensor) -> float:
    """Weights plus the most that tensors held at once during one forward, from the allocator's own account.

    NaN on a device whose allocator keeps no account of peaks (MPS).
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if images.device.type in KEEPS_PEAKS:
        account = torch.get_device_module(images.device)
        account.reset_peak_memory_stats(images.device)
        before = account.memory_allocated(images.device)
        model(images)
        return float((weights + account.max_memory_allocated(images.device) - before) / MIB)
    if images.device.type != "cpu":
        return nan
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else it reports on stderr that there is no GPU
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        model(images)
    return (weights + _peak_of(profile)) / MIB


def _peak_of(profile: torch.profiler.profile) -> int:
    held = peak = 0
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def process_peak_mib(device: torch.device) -> float:
    """Most memory this process has held."""
    if device.type in KEEPS_PEAKS:
        return float(torch.get_device_module(device).max_memory_allocated(device) / MIB)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
