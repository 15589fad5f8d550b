"""Packages that only bulk runs need."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def arrow_errors() -> Iterator[None]:
    """Inside, what only pyarrow calls an error (no thread could be started) is an OSError as everywhere else."""
    pyarrow = required("pyarrow")
    try:
        yield
    except pyarrow.ArrowException as error:
        if isinstance(error, (ValueError, TypeError, OSError, RuntimeError, MemoryError)):
            raise
        raise OSError(f"pyarrow: {error}") from error
