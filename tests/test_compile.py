"""torch.compile: one graph, compiled once, for every method, over a whole evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import random_images, tiny_vit
from torch import Tensor, nn

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


def pruned(name: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    model = tiny_vit().to(dtype)
    prune_(model, PruneConfig(method=name, keep_rate=0.4), verify=False, **options)
    return model


def evaluation(dtype: torch.dtype) -> list[Tensor]:
    return [random_images(size, seed=number, dtype=dtype) for number, size in enumerate(SIZES)]


def expect_one_graph() -> None:
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_one_graph_for_a_whole_evaluation(name: str, dtype: torch.dtype) -> None:
    model, batches = pruned(name, dtype), evaluation(dtype)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        got = [compiled(images) for images in batches]
        expected = [model(images) for images in batches]
    expect_one_graph()
    if dtype == torch.float32:  # in bfloat16 a tie may go the other way
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(each).all() for each in got)


@pytest.mark.parametrize("name", ["cpvit", "cpvit-merge"])
def test_inductor_computes_what_eager_does(name: str) -> None:
    model, images = pruned(name, torch.float32), random_images(4, dtype=torch.float32)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(images)
        torch.testing.assert_close(got, model(images), rtol=1e-4, atol=1e-5)
    expect_one_graph()


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_a_model_compiled_in_place_is_compiled_once(mode: str) -> None:
    model, images = (
        pruned("cpvit", torch.float32, dense_features=False),
        random_images(2, dtype=torch.float32),
    )
    expected = model(images)
    model.compile(fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    expect_one_graph()
