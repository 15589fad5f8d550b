"""Out of PyTorch: ONNX, OpenVINO and ``torch.export`` files of dense and pruned models, and what runs them."""

from cpvit.export.description import Description, ExportError, Parity
from cpvit.export.exporting import Exported, ExportOptions, export
from cpvit.export.runtimes import ExportedModel, open_exported

__all__ = [
    "Description",
    "ExportError",
    "ExportOptions",
    "Exported",
    "ExportedModel",
    "Parity",
    "export",
    "open_exported",
]
