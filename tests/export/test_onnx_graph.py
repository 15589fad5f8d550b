"""The ONNX graph is written without needless nodes, and answers as torch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_images, tiny_vit
from torch import Tensor, nn
from torch.export import Dim

from cpvit import PruneConfig, prune_
from cpvit.export import ExportOptions, export
from cpvit.export.onnx_graph import tidy, translations

pytest.importorskip("onnxscript", reason="the extras onnx, openvino and int8 are not installed")
onnxruntime = pytest.importorskip("onnxruntime")


class Program(nn.Module):
    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


def graph_of(forward: Callable[..., Tensor], *inputs: Tensor, tidied: bool = True) -> Any:
    """The graph for any length of the first dimension."""
    open_first = tuple({0: Dim("batch", min=1, max=64)} for _ in inputs)
    program = torch.export.export(Program(forward), inputs, dynamic_shapes=(open_first,))
    table = translations(program) if tidied else None
    made = torch.onnx.export(program, dynamo=True, optimize=False, custom_translation_table=table)
    assert made is not None
    import onnxscript.optimizer

    onnxscript.optimizer.fold_constants(made.model)
    if tidied:
        tidy(made.model)
    return made.model


def run(model: Any, *inputs: Tensor) -> Tensor:
    import onnx_ir

    session = onnxruntime.InferenceSession(
        onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    return torch.from_numpy(
        session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))[0]
    )


def kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph]


def queries(batch: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, 5, 4, generator=generator) for _ in range(3)]


ATTENTION: dict[str, Callable[..., Tensor]] = {
    "plain": lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v),
    "another scale": lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, scale=0.7),
    "added mask": lambda q, k, v: nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=k[:, :1, :, 0].unsqueeze(2)
    ),
    "boolean mask": lambda q, k, v: nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=k[:, :1, :, 0].abs().unsqueeze(2) < 1
    ),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_is_scaled_once_and_stays_in_four_dimensions(kind: str) -> None:
    model = graph_of(ATTENTION[kind], *queries(2, 0))
    # The mask of these programs has nodes of its own; attention has one factor and no reshaping.
    assert kinds(model).count("Mul") == 1
    assert "Reshape" not in kinds(model)
    assert kinds(model).count("Transpose") == 1
    for batch in (1, 3):
        inputs = queries(batch, batch)
        torch.testing.assert_close(run(model, *inputs), ATTENTION[kind](*inputs))


def test_causal_attention_is_left_to_torch() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = queries(3, 1)
    torch.testing.assert_close(run(graph_of(forward, *queries(2, 0)), *inputs), forward(*inputs))


REWRITTEN: dict[str, tuple[Callable[..., Tensor], str]] = {
    "rows are added without copies": (
        lambda x: x.flatten(0, 1).index_add(0, torch.tensor([1, 1, 0]), x[0, :3] * 2).view(x.shape),
        "Transpose",
    ),
    "norms": (lambda x: torch.linalg.vector_norm(x, dim=-1) + 1, "ReduceL2"),
    "norms that keep their dimension": (
        lambda x: x / torch.linalg.vector_norm(x, dim=1, keepdim=True),
        "ReduceL2",
    ),
    "sorting": (lambda x: x.sort(dim=1, descending=True).values, "Shape"),
    "shapes that are known but for the images": (
        lambda x: x.reshape(15 * x.shape[0], 4).exp().view(x.shape),
        "Concat",
    ),
    "a shape after a shape": (lambda x: x.reshape(x.shape[0], 60).view(x.shape[0], 5, 12), "Concat"),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_what_is_rewritten_answers_the_same(name: str) -> None:
    forward, gone = REWRITTEN[name]
    example = torch.randn(2, 15, 4, generator=torch.Generator().manual_seed(0))
    assert gone in kinds(graph_of(forward, example, tidied=False)), "torch writes no such node any more"
    model = graph_of(forward, example)
    assert gone not in kinds(model)
    for batch in (1, 2, 3):
        images = torch.randn(batch, 15, 4, generator=torch.Generator().manual_seed(batch))
        torch.testing.assert_close(run(model, images), forward(images))


def test_two_open_dimensions_keep_their_shape() -> None:
    """-1 can stand for one of them only."""

    def forward(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1] // 2, 2).exp()

    program = torch.export.export(
        Program(forward),
        (torch.randn(2, 6),),
        dynamic_shapes=(({0: Dim("batch", max=64), 1: 2 * Dim("half", max=64)},),),
    )
    made = torch.onnx.export(
        program, dynamo=True, optimize=False, custom_translation_table=translations(program)
    )
    assert made is not None
    tidy(made.model)
    images = torch.randn(3, 8)
    torch.testing.assert_close(run(made.model, images), forward(images))


@pytest.mark.parametrize("method", ["cpvit", "cpvit-merge", "tome", "pitome"])
def test_a_pruned_model_computes_no_shape_to_reshape_to(tmp_path: Path, method: str) -> None:
    import onnx

    model = tiny_vit(depth=3).float()
    prune_(model, PruneConfig(method=method, macs=0.6))
    path = export(
        model, tmp_path / "m.onnx", ExportOptions(to="onnx"), images=random_images(2, dtype=torch.float32)
    ).path
    graph = onnx.load(path).graph
    fixed = {tensor.name for tensor in graph.initializer}
    assert all(node.input[1] in fixed for node in graph.node if node.op_type == "Reshape")
    assert "ReduceL2" not in {node.op_type for node in graph.node}
    for node in graph.node:
        if node.op_type == "Transpose":
            axes = list(node.attribute[0].ints)
            assert axes != sorted(axes)
