"""torch.compile: one graph, compiled once, for every method, over a whole evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import random_images, tiny_vit
from torch import nn

from cpvit import PruneConfig, prune_
from cpvit.methods import METHODS

SIZES = (4, 4, 3, 4, 2)
"""Batches of an evaluation: the last, and here one in between, is smaller."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def pruned(name: str, dtype: torch.dtype, depth: int = 2) -> nn.Module:
    model = tiny_vit(depth=depth).to(dtype)
    prune_(model, PruneConfig(method=name, keep_rate=0.4), verify=False)
    return model


def expect_one_graph() -> None:
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_one_graph(name: str, dtype: torch.dtype) -> None:
    model = pruned(name, dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for seed in (1, 2):
            images = random_images(seed=seed, dtype=dtype)
            got, expected = compiled(images), model(images)
            assert torch.isfinite(got).all()
            if dtype == torch.float32:  # in bfloat16 a tie may go the other way
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    expect_one_graph()


@pytest.mark.parametrize("name", ["cpvit", "cpvit-merge"])
def test_batches_of_any_size_share_one_graph(name: str) -> None:
    model = pruned(name, torch.float64)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for number, size in enumerate(SIZES):
        images = random_images(size, seed=number)
        torch.testing.assert_close(compiled(images), model(images))
    expect_one_graph()


def test_inductor_merges_as_eager_does() -> None:
    """Three blocks, so that several tokens go into one that stands for several itself."""
    model, images = pruned("cpvit-merge", torch.float64, depth=3), random_images(4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images))
    expect_one_graph()


def test_max_autotune_removes_as_eager_does() -> None:
    model, images = pruned("cpvit", torch.float32, depth=1), random_images(dtype=torch.float32)
    with torch.no_grad():
        expected = model(images)
        model.compile(fullgraph=True, mode="max-autotune")
        for _ in range(2):
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    expect_one_graph()
