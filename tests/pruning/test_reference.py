"""The library against the slow oracle, which never removes a token: survivors equal, logits to 1e-10."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import PREFIX, tiny_vit
from reference import equivalent_macs, paper_oracle, released_oracle
from torch import Tensor

from cpvit import PruneConfig, plan_of, prune_, record, unprune_
from cpvit.plans.macs import count_macs

SCHEDULES = {
    "every block": (30, 20, 9),
    "last block only": (35, 35, 12),
    "one patch": (35, 1, 1),
    "first block only": (20, 20, 20),
    "single steps": (34, 33, 32),
    "nothing": (35, 35, 35),
}
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.mark.parametrize("variant", sorted(PREFIX))
@pytest.mark.parametrize("keep", [SCHEDULES["every block"], SCHEDULES["last block only"]])
def test_every_kind_of_model_prunes_as_the_paper_says(
    variant: str, keep: tuple[int, ...], images: Tensor
) -> None:
    model = tiny_vit(variant)
    assert model.num_prefix_tokens == PREFIX[variant]
    expected = paper_oracle(model, images, keep)
    prune_(model, PruneConfig(keep_per_block=keep))
    with record(model) as trace, torch.inference_mode():
        logits = model(images)
    for got, wanted in zip(trace.survivors, expected.survivors, strict=True):
        assert torch.equal(got, wanted)
    torch.testing.assert_close(logits, expected.logits, **EXACT)


@pytest.mark.parametrize("keep", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_every_schedule_prunes_as_the_paper_says(keep: tuple[int, ...], images: Tensor) -> None:
    model = tiny_vit("registers", seed=3)
    expected = paper_oracle(model, images, keep)
    prune_(model, PruneConfig(keep_per_block=keep))
    with record(model) as trace, torch.inference_mode():
        logits = model(images)
    assert all(torch.equal(*pair) for pair in zip(trace.survivors, expected.survivors, strict=True))
    torch.testing.assert_close(logits, expected.logits, **EXACT)


def test_the_oracle_that_keeps_everything_is_the_host(images: Tensor) -> None:
    model = tiny_vit("registers")
    with torch.inference_mode():
        torch.testing.assert_close(paper_oracle(model, images, [35] * 3).logits, model(images), **EXACT)


@pytest.mark.parametrize("variant", ["class", "none", "registers"])
def test_heads_masked_per_image_by_their_cumulative_score_stay_out(images: Tensor, variant: str) -> None:
    model, keep = tiny_vit(variant, depth=4, seed=5), (30, 24, 20, 11)
    plan = prune_(model, PruneConfig(keep_per_block=keep, head_keep_rate=0.4, head_mode="mask"))
    assert plan.mask_heads is not None
    assert (plan.mask_heads[-1], plan.heads) == (2, None)
    expected = paper_oracle(model_untouched(model), images, keep, plan.mask_heads).logits
    prune_(model, plan)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected, **EXACT)


def model_untouched(model: Any) -> Any:
    unprune_(model)
    return model


@pytest.mark.parametrize("variant", ["class", "none", "registers"])
def test_heads_cut_out_of_the_weights_act_as_if_they_gave_nothing(images: Tensor, variant: str) -> None:
    model, keep, heads = tiny_vit(variant), (30, 20, 9), ((0, 2, 3, 4), (0, 2, 4), (2,))
    expected = paper_oracle(model, images, keep, heads_given=heads)
    plan = prune_(model, PruneConfig(keep_per_block=keep))
    prune_(model, dataclasses.replace(plan, heads=heads))
    with record(model) as trace, torch.inference_mode():
        logits = model(images)
    assert all(torch.equal(*pair) for pair in zip(trace.survivors, expected.survivors, strict=True))
    torch.testing.assert_close(logits, expected.logits, **EXACT)
    assert plan_of(model).heads_per_block == (4, 3, 1)


@pytest.mark.parametrize("counter", ["intended", "released"])
def test_the_released_code_with_ratios_of_zero_is_the_host(images: Tensor, counter: str) -> None:
    model = tiny_vit(depth=12)
    out = released_oracle(model, images, counter=counter, scale=0.0)
    with torch.inference_mode():
        torch.testing.assert_close(out.logits, model(images), **EXACT)
    assert out.attention_tokens == out.ffn_tokens == [36.0] * 12
    assert equivalent_macs(model, out.attention_tokens, out.ffn_tokens) == count_macs(model)


def test_the_intended_released_schedule_zeroes_as_many_tokens_as_it_says(images: Tensor) -> None:
    out = released_oracle(tiny_vit(depth=12), images)
    ratios = [0, 0, 0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.3, 0.3, 0.3]
    assert out.attention_tokens == [36 - int(ratio * 36 + 1e-9) for ratio in ratios]
    assert out.ffn_tokens == [36 - int(0.04 * count * 36 + 1e-9) for count in range(12)]


def test_the_released_counter_runs_two_cascades_and_hardly_prunes_the_mlp(images: Tensor) -> None:
    model = tiny_vit(depth=12)
    out = released_oracle(model, images, counter="released")
    assert out.attention_tokens == [36, 36, 33, 29, 26, 26] * 2
    mended = released_oracle(model, images, counter="released", stale=False)
    assert sum(out.ffn_tokens) > sum(mended.ffn_tokens)
