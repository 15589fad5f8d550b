"""ONNX file -> OpenVINO model and files (``model.xml`` and ``model.bin``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpvit.export.description import KEY, OUTPUT, SUFFIXES, Description, ExportError
from cpvit.export.requirements import required


def read_openvino(path: Path) -> Any:
    """An ``openvino.Model`` from an ONNX or OpenVINO file.

    Raises:
        ExportError: It cannot be read.
    """
    openvino = required("openvino")
    try:
        if path.suffix == SUFFIXES["openvino"]:
            return _read_own(path)
        return openvino.Core().read_model(path)
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot read {path}: {last_line(error)}") from error
    except UnicodeDecodeError as error:  # it quotes the file
        raise ExportError(f"OpenVINO cannot read {path}: what it says of it is no text") from error


def _read_own(path: Path) -> Any:
    """By the reader of its own format: ``read_model`` would try those of TensorFlow and Paddle on what is damaged."""
    from openvino.frontend import FrontEndManager

    reader = FrontEndManager().load_by_framework("ir")
    return reader.convert(reader.load(str(path)))


def write_openvino(model: Any, path: Path, description: Description) -> None:
    """Write it with its description.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    openvino = required("openvino")
    model.outputs[0].get_tensor().set_names({OUTPUT})
    model.set_rt_info(description.to_json(), [KEY])
    try:
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise OSError(f"OpenVINO cannot write {path}: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """What a runtime says in the end, without its own file names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
