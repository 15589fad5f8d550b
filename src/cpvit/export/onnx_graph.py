"""An ONNX graph without nodes that move nothing and shapes computed anew at every call.

torch writes each operation on its own, for any shape. A pruned model has hundreds of small ones, each of which costs
a runtime some microseconds and many of which copy their input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch.export import ExportedProgram

from cpvit.export.requirements import required

Translations = dict[Callable[..., Any], Callable[..., Any]]


ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def translations(program: ExportedProgram) -> Translations:
    """What torch's own translation to ONNX writes with needless copies, and how it is written here.

    Attention that is causal, grouped or drops weights is left to torch, and with it all attention of the program.
    """
    table: Translations = {torch.ops.aten.index_select.default: _index_select}
    if all(_is_plain(node) for node in program.graph.nodes if node.target is ATTENTION):
        table[ATTENTION] = _attention
    return table


def _is_plain(node: torch.fx.Node) -> bool:
    named = ("dropout_p", "is_causal", "enable_gqa")
    return not any(node.args[4:]) and not any(node.kwargs.get(name) for name in named)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The products are scaled once, where torch scales queries and keys and goes through three dimensions."""
    op = required("onnxscript").opset20
    axes = [*range(len(query.shape) - 2), len(query.shape) - 1, len(query.shape) - 2]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    products = op.Mul(op.MatMul(query, op.Transpose(key, perm=axes)), _constant(factor, query.dtype.numpy()))
    if attn_mask is not None and attn_mask.dtype == required("onnx_ir").DataType.BOOL:
        masked = _constant(-numpy.inf, query.dtype.numpy())
        products = op.Where(attn_mask, products, masked)
    elif attn_mask is not None:
        products = op.Add(products, attn_mask)
    return op.MatMul(op.Softmax(products, axis=-1), value)


def _index_select(self: Any, dim: int, index: Any) -> Any:
    op = required("onnxscript").opset20
    rows = index if len(index.shape) == 1 else op.Reshape(index, _constant([-1], numpy.int64))
    return op.Gather(self, rows, axis=dim)


def _constant(values: float | Sequence[int], dtype: Any) -> Any:
    onnx_ir = required("onnx_ir")
    return required("onnxscript").opset20.Constant(value=onnx_ir.tensor(numpy.array(values, dtype=dtype)))


def tidy(model: Any) -> None:
    """Rewrite an ``onnx_ir.Model`` in place into fewer nodes with the same results."""
    required("onnx_ir")
    from onnx_ir.passes.common import (
        CommonSubexpressionEliminationPass,
        DeduplicateInitializersPass,
        LiftConstantsToInitializersPass,
        RemoveUnusedNodesPass,
    )

    for node in list(model.graph):
        if node.domain == "" and node.op_type in REWRITES:
            REWRITES[node.op_type](model.graph, node)
    RemoveUnusedNodesPass()(model)
    # Equal nodes are found only where their constants are one.
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass()(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


def _without_transpose(graph: Any, node: Any) -> None:
    """A transposition that leaves all axes where they are copies its input."""
    axes = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else [1, 0]
    if axes == sorted(axes):
        _replace(graph, node, node.inputs[0])


def _with_fixed_shape(graph: Any, node: Any) -> None:
    """Where only the number of images is open, -1 stands for it, and nothing has to be computed."""
    shape = node.outputs[0].shape
    if shape is None:
        return
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1 or 0 in sizes:
        return
    before = node.inputs[0].producer()
    node.replace_input_with(1, _initializer(graph, f"{node.outputs[0].name}_shape", sizes))
    node.attributes["allowzero"] = required("onnx_ir").AttrInt64("allowzero", 0)
    if before is not None and before.op_type == "Reshape" and before.domain == "":
        node.replace_input_with(0, before.inputs[0])


def _with_known_size(graph: Any, node: Any) -> None:
    """One size of a shape, where it is known."""
    shape, place = node.inputs[0].producer(), node.inputs[1].const_value
    if shape is None or shape.op_type != "Shape" or place is None or place.size != 1:
        return
    sizes = shape.inputs[0].shape
    first = shape.attributes["start"].as_int() if "start" in shape.attributes else 0
    if sizes is None or first != 0 or "end" in shape.attributes:
        return
    size = sizes[int(place.numpy().item())]
    if isinstance(size, int):
        value = numpy.full(place.shape.numpy(), size)
        _replace(graph, node, _initializer(graph, f"{node.outputs[0].name}_known", value))


def _as_root_of_sum(graph: Any, node: Any) -> None:
    """``ReduceL2`` takes ONNX Runtime several times as long as the sum of the squares."""
    onnx_ir = required("onnx_ir")
    squares = onnx_ir.node("Mul", [node.inputs[0], node.inputs[0]])
    total = onnx_ir.node("ReduceSum", [squares.outputs[0], *node.inputs[1:]], node.attributes)
    root = onnx_ir.node("Sqrt", total.outputs)
    for new, like in ((squares, node.inputs[0]), (total, node.outputs[0]), (root, node.outputs[0])):
        new.outputs[0].shape, new.outputs[0].type = like.shape, like.type
    graph.insert_before(node, [squares, total, root])
    _replace(graph, node, root.outputs[0])


REWRITES: dict[str, Callable[[Any, Any], None]] = {
    "Transpose": _without_transpose,
    "Reshape": _with_fixed_shape,
    "Gather": _with_known_size,
    "ReduceL2": _as_root_of_sum,
}


def _initializer(graph: Any, name: str, values: Any) -> Any:
    onnx_ir = required("onnx_ir")
    tensor = onnx_ir.tensor(numpy.asarray(values, dtype=numpy.int64), name=name)
    value = onnx_ir.val(name, const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace(graph: Any, node: Any, value: Any) -> None:
    """Let all who read the node's output read this value instead; an output of the graph keeps its node."""
    if not node.outputs[0].is_graph_output():
        node.outputs[0].replace_all_uses_with(value)
