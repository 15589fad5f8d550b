"""Devices and dtypes by name."""

from __future__ import annotations

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one; anything else is torch's name of a device.

    Raises:
        ValueError: Unknown, or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:1 ..., got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for and torch sees no CUDA device here; use --device cpu"
        )
    return device


def choose_dtype(name: str) -> torch.dtype:
    """Look a dtype up by name.

    Raises:
        ValueError: Not one of those supported.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
