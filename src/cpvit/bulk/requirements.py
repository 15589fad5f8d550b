"""Packages that only bulk runs need."""

from __future__ import annotations

import importlib
from types import ModuleType

INSTALL = {
    "pyarrow": "'cpvit[bulk]'",
    "pyarrow.parquet": "'cpvit[bulk]'",
    "pyarrow.csv": "'cpvit[bulk]'",
    "pyarrow.compute": "'cpvit[bulk]'",
    "ray": "'cpvit[ray]'",
    "ray.data": "'cpvit[ray]'",
    "datasets": "datasets",
}


class MissingPackageError(ValueError):
    """An optional package cannot be imported; the message has the command that installs it."""


def required(module: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{module} is needed for this and cannot be imported ({error}): pip install {INSTALL[module]}"
        ) from error
