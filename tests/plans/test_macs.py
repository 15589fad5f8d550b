"""The closed formula and torch's own counter must agree, on dense, pruned and head-cut models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import torch
from conftest import IMAGE, PREFIX, tiny_vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cpvit import PruneConfig, prune_
from cpvit.adapters import open_host
from cpvit.adapters.host import BlockCosts
from cpvit.methods import METHODS
from cpvit.plans.costs import cost_model
from cpvit.plans.macs import count_macs


def by_hand(model: Any) -> int:
    """MACs of a tiny ViT with a linear head, from the sizes alone."""
    tokens, dim, hidden, patches = 35 + model.num_prefix_tokens, 30, 66, 35
    block = tokens * (3 * dim * dim + dim * dim + 2 * dim * hidden) + 2 * tokens * tokens * dim
    return patches * 3 * 64 * dim + 3 * block + dim * 11


@pytest.mark.parametrize("variant", ["class", "registers", "none", "avg"])
def test_the_count_of_a_dense_model_is_what_its_sizes_say(variant: str) -> None:
    model = tiny_vit(variant)
    assert count_macs(model) == by_hand(model)


def test_deit_tiny_has_the_published_count() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224")
    assert count_macs(model) == pytest.approx(1.26e9, rel=0.01)


@pytest.mark.parametrize("variant", sorted(PREFIX))
@pytest.mark.parametrize("keep", [(35, 35, 35), (30, 20, 9), (35, 35, 12), (1, 1, 1)])
def test_formula_and_counter_agree(variant: str, keep: tuple[int, ...]) -> None:
    model = tiny_vit(variant)
    formula = cost_model(open_host(model)).total(keep)
    dense = count_macs(model)
    plan = prune_(model, PruneConfig(keep_per_block=keep))
    assert count_macs(model) == formula
    assert plan.macs_ratio == pytest.approx(formula / dense, abs=1e-6)


@pytest.mark.parametrize("variant", ["class", "none", "map", "qk_norm", "unbiased"])
def test_formula_and_counter_agree_with_heads_cut(variant: str) -> None:
    model, keep, heads = tiny_vit(variant), (30, 20, 9), ((0, 2, 3, 4), (0, 2, 4), (2,))
    formula = cost_model(open_host(model), [4, 3, 1]).total(keep)
    plan = prune_(model, PruneConfig(keep_per_block=keep))
    prune_(model, dataclasses.replace(plan, heads=heads))
    assert count_macs(model) == formula


@pytest.mark.parametrize("variant", ["class", "none", "map"])
@pytest.mark.parametrize("method", METHODS)
def test_every_methods_plan_states_the_macs_that_torch_counts(method: str, variant: str) -> None:
    model = tiny_vit(variant)
    dense = count_macs(model)
    plan = prune_(model, PruneConfig(method=method, keep_rate=0.4))
    assert plan.macs_ratio == pytest.approx(count_macs(model) / dense, abs=1e-6)


def test_masked_heads_save_nothing() -> None:
    model, keep = tiny_vit(), (30, 20, 9)
    prune_(model, PruneConfig(keep_per_block=keep))
    expected = count_macs(model)
    plan = prune_(model, PruneConfig(keep_per_block=keep, head_keep_rate=0.4, head_mode="mask"))
    assert count_macs(model) == expected
    assert plan.macs_ratio == pytest.approx(expected / cost_model(open_host(tiny_vit())).dense, abs=1e-6)


def test_the_count_is_torchs_own_of_a_real_forward() -> None:
    model = tiny_vit("registers")
    prune_(model, PruneConfig(keep_per_block=(30, 20, 9)))
    counter = FlopCounterMode(display=False)
    # With autograd, since without it keys are padded to whole registers: work of the kernel's, not of the model.
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, 3, *IMAGE, dtype=torch.float64))
    assert count_macs(model) == counter.get_total_flops() // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_count_does_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    assert count_macs(tiny_vit().to(dtype)) == count_macs(tiny_vit())


@pytest.mark.parametrize("training", [False, True])
def test_counting_leaves_the_model_as_it_was(training: bool) -> None:
    model = tiny_vit().train(training)
    count_macs(model)
    assert model.training == training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_removed_patch_saves_its_share_of_attention_pooling() -> None:
    pooled, plain = (cost_model(open_host(tiny_vit(variant))) for variant in ("map", "none"))
    saved = [costs.dense - costs.total([35, 35, 34]) for costs in (pooled, plain)]
    assert saved[0] - saved[1] == pooled.pool_token > 0


def test_a_formula_that_exceeds_the_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpvit.adapters.timm_vit.TimmBlock.costs", lambda _: BlockCosts(10**9, 0, 0))
    with pytest.raises(
        RuntimeError, match=r"the cost formula of vit_tiny_patch16_224 exceeds torch's count by \d+"
    ):
        cost_model(open_host(tiny_vit()))


@pytest.mark.parametrize("method", METHODS)
def test_the_count_is_the_same_in_inference_mode(method: str) -> None:
    """There the counter of torch 2.5 sees no multiplication at all, unless it is left."""
    model = tiny_vit()
    prune_(model, PruneConfig(method=method, keep_rate=0.4))
    expected = count_macs(model)
    with torch.inference_mode():
        assert count_macs(model) == expected


def test_a_count_of_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlopCounterMode, "get_total_flops", lambda _: 0)
    with pytest.raises(RuntimeError, match=r"torch \S+ counted no operation of vit_tiny_patch16_224"):
        count_macs(tiny_vit())
