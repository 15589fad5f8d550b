"""``cpvit-merge`` against the slow implementation, block by block: tokens, sizes, carriers and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import PREFIX, random_images, tiny_vit
from reference import merge_oracle
from torch import Tensor

from cpvit import PruneConfig, prune_, record
from cpvit.core import TokenState, run_block
from cpvit.methods.cpvit_merge import merge_cost

EXACT = {"rtol": 0, "atol": 1e-10}
POOLS_PATCHES = ("none", "map", "avg")

SCHEDULES = {
    "some in every block": (30, 24, 19),
    "half of every block": (18, 9, 5),
    "more than half": (14, 6, 2),
    "more than half, then half": (12, 7, 4),
    "one token is left": (35, 1, 1),
    "first block only": (20, 20, 20),
    "last block only": (35, 35, 20),
    "last block to less than half": (33, 33, 11),
    "one at a time": (34, 33, 32),
}


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, TokenState]]:
    """Tokens and state that leave each block, in the order in which blocks are run."""
    seen: list[tuple[Tensor, TokenState]] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        result = run_block(*args, **kwargs)
        seen.append(result[:2])
        return result

    monkeypatch.setattr("cpvit.pruning.cascade.run_block", run)
    return seen


def compare(model: Any, variant: str, images: Tensor, keep: tuple[int, ...], leaving: list[Any]) -> None:
    expected = merge_oracle(model, images, keep, pools_patches=variant in POOLS_PATCHES)
    prune_(model, PruneConfig(method="cpvit-merge", keep_per_block=keep))
    leaving.clear()
    with record(model) as trace, torch.inference_mode():
        logits = model(images)
    assert len(leaving) == len(keep)
    for block, (x, state) in enumerate(leaving):
        torch.testing.assert_close(
            x, expected.tokens[block], **EXACT, msg=lambda m, b=block: f"block {b}: {m}"
        )
        size = torch.ones_like(expected.sizes[block]) if state.size is None else state.size
        torch.testing.assert_close(size, expected.sizes[block], **EXACT)
        assert torch.equal(state.positions, expected.positions[block])
        assert torch.equal(trace.survivors[block], expected.positions[block])
        assert torch.equal(trace.carriers[block], expected.carriers[block])
    torch.testing.assert_close(logits, expected.logits, **EXACT)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected.logits, **EXACT)


@pytest.mark.parametrize("variant", sorted(PREFIX))
@pytest.mark.parametrize("schedule", ["some in every block", "more than half, then half"])
def test_every_kind_of_model_merges_as_described(variant: str, schedule: str, leaving: list[Any]) -> None:
    compare(tiny_vit(variant), variant, random_images(2), SCHEDULES[schedule], leaving)


@pytest.mark.parametrize("keep", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("variant", ["registers", "none"])
def test_every_schedule_merges_as_described(variant: str, keep: tuple[int, ...], leaving: list[Any]) -> None:
    compare(tiny_vit(variant, seed=3), variant, random_images(2, seed=4), keep, leaving)


@pytest.mark.parametrize("batch", [1, 5])
def test_every_batch_size_merges_as_described(batch: int, leaving: list[Any]) -> None:
    keep = (29, 25, 20, 9, 4)
    compare(tiny_vit("class", depth=5, seed=7), "class", random_images(batch, seed=8), keep, leaving)


def test_the_slow_implementation_that_merges_nothing_is_the_host(images: Tensor) -> None:
    for variant in ("registers", "map"):
        model = tiny_vit(variant)
        got = merge_oracle(model, images, [35] * 3, pools_patches=variant in POOLS_PATCHES)
        with torch.inference_mode():
            torch.testing.assert_close(got.logits, model(images), **EXACT)


def test_equal_tokens_are_ordered_by_importance_and_size() -> None:
    """The cosine of equal tokens is 1 and their distance 0: the other factors must still count."""
    state = TokenState(
        positions=torch.arange(4)[None],
        score=torch.tensor([[3.0, 1.0, 1.0, 1.0]]),
        size=torch.tensor([[1.0, 1.0, 1.0, 1.0]]),
    )
    cost = merge_cost(state, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[1.0, 1.0000001]]), 0)
    assert 0 < cost[0, 1] < cost[0, 0]
