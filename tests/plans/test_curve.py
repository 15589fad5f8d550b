"""The schedule that needs no images: any depth, number of patches, prefix and budget, without a cliff."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from conftest import tiny_vit

from cpvit import PruneConfig, prune_
from cpvit.adapters import open_host
from cpvit.methods import method_named
from cpvit.plans.costs import CostModel, cost_model
from cpvit.plans.resolve import make_plan
from cpvit.plans.schedules import MERGING_CURVE, REMOVAL_CURVE, Curve, emptied_last

CURVES = {"cpvit": REMOVAL_CURVE, "cpvit-merge": MERGING_CURVE}
BUDGETS = [0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
SIZES = [(49, 12, 1), (196, 12, 1), (196, 24, 2), (1024, 40, 5), (4096, 12, 0)]


def model_of(patches: int, depth: int, prefix: int, method: str) -> CostModel:
    """The cost of a ViT-Tiny's blocks, at another size."""
    host = open_host(timm.create_model("vit_tiny_patch16_224"))
    cost = host.blocks[0].costs()
    return CostModel((cost,) * depth, 0, prefix, patches, host.embed_dim, 64, method_named(method))


@pytest.mark.parametrize("method", sorted(CURVES))
@pytest.mark.parametrize(("patches", "depth", "prefix"), SIZES)
@pytest.mark.parametrize("empty", [True, False])
def test_every_budget_is_met_by_a_schedule_that_never_rises(
    method: str, patches: int, depth: int, prefix: int, empty: bool
) -> None:
    from cpvit.tuning.search import Budget

    costs = model_of(patches, depth, prefix, method)
    for macs in BUDGETS:
        counts = Budget(costs, macs, costs.dense, empty_last=empty).of_curve(CURVES[method], depth)
        assert costs.total(counts) == pytest.approx(macs * costs.dense, rel=costs.tolerance)
        assert all(later <= earlier for earlier, later in pairwise((patches, *counts)))
        assert counts[-1] >= 1


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("empty", [True, False])
def test_harder_budgets_take_from_every_block_and_leave_no_cliff(curve: Curve, empty: bool) -> None:
    def counts(strength: float) -> tuple[int, ...]:
        found = curve.counts(196, 12, strength)
        return emptied_last(found, 196, strength) if empty else found

    steps = [counts(step / 200) for step in range(1600)]
    assert steps[0] == (196,) * 12
    for softer, harder in pairwise(steps):
        assert all(less <= more for more, less in zip(softer, harder, strict=True))
        assert sum(softer) - sum(harder) <= 0.03 * 196 * 12
    assert sum(steps[-1]) < 0.4 * 196 * 12


def test_the_numbers_are_those_that_were_fitted() -> None:
    """Worked out with a pocket calculator: start = 0.35 exp(-0.5) = 0.2123, u = (t - start) / (1 - start)."""
    assert Curve(onset=0.35, fade=4.0, power=1.8) == MERGING_CURVE
    assert MERGING_CURVE.counts(196, 4, 2.0) == (193, 125, 71, 44)
    assert REMOVAL_CURVE.counts(100, 2, 1.0) == (61, 50)


def test_at_its_half_strength_half_is_left_at_the_end() -> None:
    assert MERGING_CURVE.counts(1000, 12, 1.0)[-1] == 500


def deit(**options: Any) -> Any:
    return timm.create_model("deit_tiny_patch16_224", **options).eval()


def test_a_class_token_lets_the_last_block_be_emptied_and_nothing_else_does() -> None:
    def last(model: Any, **config: Any) -> int:
        return prune_(model, PruneConfig(method="cpvit-merge", **config), verify=False).patches_per_block[-1]

    assert last(deit(), macs=0.6) == 1
    assert last(deit(global_pool="avg"), macs=0.6) > 20
    assert last(deit(global_pool="", num_classes=0), macs=0.6) > 20
    assert last(deit(), keep_rate=0.5) == 98, "a keep rate says what is left at the end"
    plan = prune_(deit(), PruneConfig(method="cpvit-merge", macs=0.6), verify=False, dense_features=True)
    assert plan.patches_per_block[-1] > 20, "features were asked for"


def test_emptying_the_last_block_does_not_change_what_a_class_token_answers() -> None:
    model = tiny_vit()
    images = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    outputs = []
    for last in (1, 9):
        prune_(model, PruneConfig(method="cpvit-merge", keep_per_block=(30, 20, last)), verify=False)
        outputs.append(model(images))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (PruneConfig(method="cpvit-merge", macs=0.6), "curve"),
        (PruneConfig(method="cpvit-merge"), "curve"),
        (PruneConfig(macs=0.6), "curve"),
        (PruneConfig(), "linear-ramp"),
        (PruneConfig(macs=0.6, schedule="linear-ramp"), "linear-ramp"),
        (PruneConfig(method="cpvit-merge", macs=0.6, schedule="constant"), "constant"),
        (PruneConfig(method="tome", macs=0.7), "constant"),
        (PruneConfig(method="tome", macs=0.7, schedule="curve"), "curve"),
    ],
)
def test_which_schedule_is_the_default(config: PruneConfig, name: str) -> None:
    assert make_plan(open_host(deit()), config).schedule == name


def test_a_method_that_halves_at_most_gets_the_curve_as_far_as_it_can() -> None:
    plan = make_plan(open_host(deit()), PruneConfig(method="tome", macs=0.6, schedule="curve"))
    counts = (196, *plan.patches_per_block)
    assert all(later >= earlier - earlier // 2 for earlier, later in pairwise(counts))
    assert plan.macs_ratio == pytest.approx(0.6, rel=0.005)


def test_the_cost_model_of_this_test_is_the_librarys() -> None:
    host = open_host(timm.create_model("vit_tiny_patch16_224"))
    real, made = cost_model(host, method=method_named("cpvit")), model_of(196, 12, 1, "cpvit")
    assert made.dense == real.dense - real.outside
