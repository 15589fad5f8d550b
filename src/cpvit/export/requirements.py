"""Packages that only some formats need."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch.torch_version import TorchVersion

from cpvit.export.description import ExportError

EXTRAS = {
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "nncf": "int8",
}
OLDEST_TORCH = TorchVersion("2.9")
"""Whose ONNX exporter takes a torch.export program with any batch size and gives an onnx_ir model."""


def required(package: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ExportError: It is not installed; the message has the command.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"{package} is needed for this and cannot be imported ({error}): "
            f"pip install 'cpvit[{EXTRAS[package]}]'"
        ) from error


def check_torch() -> None:
    """Raise ExportError if this torch cannot write ONNX."""
    if torch.__version__ < OLDEST_TORCH:
        raise ExportError(
            f"ONNX and OpenVINO files are written with torch {OLDEST_TORCH} or newer, this is {torch.__version__}; "
            "upgrade torch, or export with --to torch"
        )
