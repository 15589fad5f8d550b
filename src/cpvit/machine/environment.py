"""Where a number was measured: versions, device, dtype, threads, seed."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Environment:
    """Goes into every record."""

    versions: dict[str, str]
    device: str
    device_name: str
    dtype: str
    threads: int
    seed: int


def describe_environment(device: torch.device, dtype: torch.dtype, seed: int) -> Environment:
    """Describe this process."""
    packages = ("cpvit", "torch", "torchvision", "timm", "transformers")
    found = {name: number for name in packages if (number := _version(name))}
    return Environment(
        versions={"python": platform.python_version(), **found},
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        seed=seed,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
