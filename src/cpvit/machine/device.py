"""Devices and dtypes by name."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

BEFORE_ACCELERATORS = torch.__version__ < TorchVersion("2.6")


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is torch's accelerator (CUDA, MPS, XPU ...) if there is one, else the CPU.

    Raises:
        ValueError: Unknown, or not on this machine.
    """
    here = _accelerator()
    if name == "auto":
        return torch.device("cpu") if here is None else here
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:1 ..., got {name!r}") from None
    if device.type in ("cpu", "meta") or (here is not None and device.type == here.type):
        return device
    kind = device.type.upper()
    raise ValueError(f"device {name!r} was asked for and torch sees no {kind} device here; use --device cpu")


def _accelerator() -> torch.device | None:
    """torch's accelerator of this machine; before torch 2.6 only CUDA can be asked about."""
    if BEFORE_ACCELERATORS:
        return torch.device("cuda") if torch.cuda.is_available() else None
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type == "cpu":
        return
    if BEFORE_ACCELERATORS:
        torch.cuda.synchronize(device)
    else:
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return name if device.type == "cpu" else f"{name} ({device.type})"


def choose_dtype(name: str) -> torch.dtype:
    """Look a dtype up by name.

    Raises:
        ValueError: Not one of those supported.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
