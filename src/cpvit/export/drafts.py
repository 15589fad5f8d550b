"""From a traced program to files, each in a folder of its own: one, or for int8 one for every setting tried."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from cpvit.export.description import KEY, Description
from cpvit.export.int8 import SMOOTHING, compressed_weights, quantized_onnx, quantized_openvino
from cpvit.export.onnx_files import to_onnx, write_onnx
from cpvit.export.openvino_files import read_openvino, write_openvino
from cpvit.export.requirements import required


@dataclass(frozen=True)
class Drafts:
    """What is written, and where."""

    description: Description
    folder: Path
    """To put the drafts' folders into."""
    name: str
    """Of the file in each."""
    inputs: Tensor
    """What the graph takes: int8 is calibrated on it."""

    def write(self, traced: ExportedProgram) -> Iterator[Path]:
        """The paths of the files, one after the other."""
        if self.description.format == "torch":
            path = self._place("torch")
            # Not to the file itself: torch's writer ends the process where the disk is full.
            content = io.BytesIO()
            torch.export.save(traced, content, extra_files={KEY: self.description.to_json()})
            path.write_bytes(content.getbuffer())
            yield path
            return
        base = self._place("onnx").with_suffix(".onnx")
        write_onnx(to_onnx(traced, self.description), base)
        if self.description.format == "onnx":
            yield from self._onnx(base)
        else:
            yield from self._openvino(base)

    def _place(self, folder: str) -> Path:
        path = self.folder / folder / self.name
        path.parent.mkdir()
        return path

    def _onnx(self, base: Path) -> Iterator[Path]:
        if self.description.precision == "float32":
            yield base
            return
        for smoothing in SMOOTHING:
            path = self._place(f"smoothing-{smoothing}")
            required("onnx").save(quantized_onnx(base, self.inputs, smoothing), path)
            yield path

    def _openvino(self, base: Path) -> Iterator[Path]:
        if self.description.precision != "int8":
            path, model = self._place("openvino"), read_openvino(base)
            weights_only = self.description.precision == "int8-weights"
            write_openvino(compressed_weights(model) if weights_only else model, path, self.description)
            yield path
            return
        for smoothing in SMOOTHING:
            path = self._place(f"smoothing-{smoothing}")
            model = quantized_openvino(read_openvino(base), self.inputs, smoothing)
            write_openvino(model, path, self.description)
            yield path
