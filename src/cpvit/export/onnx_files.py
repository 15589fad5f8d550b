"""``torch.export`` program -> ONNX file."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from cpvit.export.description import INPUT, KEY, OUTPUT, Description
from cpvit.export.onnx_graph import tidy, translations
from cpvit.export.requirements import check_torch, required

OPSET = 20
LARGEST_FILE = 2_000_000_000
"""Bytes of weights in one file: protobuf's limit, nearly. Larger ones lie in a file beside it."""


def to_onnx(program: ExportedProgram, description: Description) -> Any:
    """An ``onnx_ir.Model``, with the description in its metadata.

    torch's own optimiser of the graph is left out: its pattern matching takes three quarters of the whole export, and
    the runtimes do the same when they load the file. Constants are folded, and the graph is made smaller
    (:mod:`cpvit.export.onnx_graph`).
    """
    check_torch()
    for package in ("onnx", "onnx_ir", "onnxscript"):
        required(package)
    import onnxscript.optimizer

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            custom_translation_table=translations(program),
        )
        assert made is not None
        model = made.model
        onnxscript.optimizer.fold_constants(model)
        tidy(model)
    _name_batch(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # where in this machine's files it came from
    model.metadata_props.clear()
    model.metadata_props[KEY] = description.to_json()
    model.producer_name, model.producer_version = "cpvit", description.versions.get("cpvit", "")
    return model


def _name_batch(model: Any) -> None:
    """Call the first dimension "batch", where it is not fixed, instead of by torch's number for it."""
    onnx_ir = required("onnx_ir")
    first = model.graph.inputs[0].shape[0]
    if isinstance(first, int):
        return
    name = first.value
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        dims = () if value.shape is None else value.shape.dims
        if any(not isinstance(dim, int) for dim in dims):
            named = (_renamed(onnx_ir, dim, name) for dim in dims)
            value.shape = onnx_ir.Shape(named)


def _renamed(onnx_ir: Any, dim: Any, name: str) -> Any:
    if isinstance(dim, int) or dim.value is None:
        return dim
    return onnx_ir.SymbolicDim(re.sub(rf"\b{name}\b", "batch", dim.value))


def write_onnx(model: Any, path: Path) -> None:
    """Write it; weights beyond protobuf's limit into ``path.data`` beside it."""
    onnx_ir = required("onnx_ir")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    external = f"{path.name}.data" if size > LARGEST_FILE else None
    onnx_ir.save(model, path, external_data=external)
