"""Where a number was measured: versions, device, dtype, threads, seed."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from cpvit.machine.device import device_name


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
    found = {name: number for name in packages if (number := package_version(name))}
    return Environment(
        versions={"python": platform.python_version(), **found},
        device=str(device),
        device_name=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        seed=seed,
    )


def package_version(package: str) -> str | None:
    """Installed version; None if it is not installed (or runs from its source)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
