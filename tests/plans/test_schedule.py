"""How pruning is spread over depth, and that a budget is met."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from conftest import tiny_vit

from cpvit.adapters import Host, open_host
from cpvit.methods import method_named
from cpvit.plans.budget import BudgetError, _settle, for_keep_rate, for_macs, solve_macs
from cpvit.plans.costs import cost_model
from cpvit.plans.schedules import aligned, allowed, constant, halved_at_most, kept, layer_aware, linear_ramp
from cpvit.plans.steps import make_steps


def never_rises(counts: tuple[int, ...]) -> bool:
    return list(counts) == sorted(counts, reverse=True)


def test_the_ramp_is_the_released_codes() -> None:
    r_set = 0.2
    released = [r_set + (block - 5) * r_set / 12 for block in range(12)]
    assert linear_ramp(12) == pytest.approx([ratio / released[-1] for ratio in released])


@pytest.mark.parametrize("depth", [1, 2, 3, 40])
def test_every_shape_is_whole_and_never_falls(depth: int) -> None:
    for shape in (linear_ramp(depth), constant(depth), layer_aware([1.0 + block for block in range(depth)])):
        assert len(shape) == depth
        assert min(shape) > 0
        assert shape[-1] == pytest.approx(1)
        assert list(shape) == sorted(shape)


def test_the_constant_schedule_removes_as_many_in_every_block() -> None:
    assert for_keep_rate(100, constant(5), 0.5) == (90, 80, 70, 60, 50)


def test_blocks_that_look_far_bear_more() -> None:
    near_far = layer_aware([1.0, 1.0, 9.0, 9.0])
    far_near = layer_aware([9.0, 9.0, 1.0, 1.0])
    assert near_far[1] < linear_ramp(4)[1]
    assert near_far[2] > linear_ramp(4)[2]
    assert far_near == (far_near[0],) * 4


def test_where_all_blocks_look_equally_far_depth_decides() -> None:
    assert layer_aware([3.0] * 6) == pytest.approx(linear_ramp(6))
    assert layer_aware([0.0] * 6) == pytest.approx(linear_ramp(6))


def test_a_small_difference_of_ranges_moves_the_shape_only_a_little() -> None:
    nearly = layer_aware([3.0, 3.03, 3.0, 3.01])
    assert nearly == pytest.approx(linear_ramp(4), abs=0.02)


def test_counts_follow_the_shape_and_at_least_one_stays() -> None:
    assert kept(10, (0.2, 0.5, 1.0), 1.0) == (8, 5, 1)
    assert kept(10, (0.2, 0.5, 1.0), 100.0) == (1, 1, 1)
    assert kept(10, (0.2, 0.5, 1.0), 0.0) == (10, 10, 10)


@pytest.mark.parametrize("total", [1, 2, 7, 196])
def test_more_strength_never_keeps_more(total: int) -> None:
    strengths = [step / 10 for step in range(25)]
    schedules = [kept(total, linear_ramp(12), strength) for strength in strengths]
    assert all(never_rises(schedule) for schedule in schedules)
    for weaker, stronger in itertools.pairwise(schedules):
        assert all(a >= b for a, b in zip(weaker, stronger, strict=True))


MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {},
    "vit_small_patch32_224": {},
    "vit_base_patch16_224": {},
    "vit_large_patch14_clip_224": {"num_classes": 0},
    "vit_so150m_patch16_reg4_map_256": {},
    "deit_small_distilled_patch16_224": {},
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def host(request: pytest.FixtureRequest) -> Host:
    """A model of real size, without memory for its weights."""
    with torch.device("meta"):
        return open_host(timm.create_model(request.param, **MODELS[request.param]).eval())


@pytest.mark.parametrize("cut_heads", [False, True])
def test_a_budget_is_met_within_half_a_percent(host: Host, cut_heads: bool) -> None:
    heads = [block.num_heads for block in host.blocks]
    if cut_heads:
        heads = [max(1, count - (block > host.depth // 2)) for block, count in enumerate(heads)]
    dense = cost_model(host).dense
    costs = cost_model(host, heads)
    for shape in (linear_ramp(host.depth), constant(host.depth), layer_aware(range(1, host.depth + 1))):
        totals = []
        for target in (0.9, 0.75, 0.6, 0.5, 0.35):
            if target * dense > costs.dense:
                continue
            patches = for_macs(costs, shape, target, dense=dense)
            assert costs.total(patches) == pytest.approx(target * dense, rel=0.005)
            assert never_rises((host.num_patches, *patches))
            assert patches[-1] >= 1
            totals.append(costs.total(patches))
        assert totals == sorted(totals, reverse=True)


def test_the_whole_budget_prunes_nothing(host: Host) -> None:
    costs = cost_model(host)
    assert set(for_macs(costs, linear_ramp(host.depth), 1.0, dense=costs.dense)) == {host.num_patches}


@pytest.mark.parametrize("target", [0.9, 0.8, 0.7, 0.6, 0.5])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_budget_of_a_tiny_model_is_met(depth: int, target: float) -> None:
    costs = cost_model(open_host(tiny_vit(depth=depth)))
    patches = for_macs(costs, linear_ramp(depth), target, dense=costs.dense)
    assert costs.total(patches) == pytest.approx(target * costs.dense, rel=0.005)


@pytest.mark.parametrize("target", [0.9, 0.8, 0.7])
def test_a_model_too_small_for_a_budget_is_told_the_nearest(target: float) -> None:
    """One block of two patches: a whole patch is coarser than half a percent."""
    costs = cost_model(open_host(tiny_vit(depth=1, img_size=(8, 16))))
    with pytest.raises(ValueError, match=r"nearest here is (0\.\d+|1); choose a value in that range"):
        for_macs(costs, linear_ramp(1), target, dense=costs.dense)


@pytest.mark.parametrize("patches", [1, 2, 3])
def test_a_model_of_hardly_any_patches_gives_an_answer(patches: int) -> None:
    costs = cost_model(open_host(tiny_vit(img_size=(8, 8 * patches))))
    least = costs.total([1] * 3) / costs.dense
    assert for_macs(costs, linear_ramp(3), least, dense=costs.dense) == (1, 1, 1)


def test_a_budget_out_of_reach_names_what_can_be_reached() -> None:
    costs = cost_model(open_host(tiny_vit()))
    least = costs.total([1] * 3) / costs.dense
    words = rf"macs=0.1 cannot be met .* from {least:.4g} to 1 of its dense MACs, nearest here is {least:.4g}; choose"
    with pytest.raises(ValueError, match=words):
        for_macs(costs, linear_ramp(3), 0.1, dense=costs.dense)


def test_a_budget_above_what_cut_heads_leave_is_out_of_reach() -> None:
    host = open_host(tiny_vit())
    costs, dense = cost_model(host, [1, 1, 1]), cost_model(host).dense
    with pytest.raises(
        ValueError, match=rf"can spend from .* to {costs.dense / dense:.4g} of its dense MACs"
    ):
        for_macs(costs, linear_ramp(3), 0.99, dense=dense)


def test_allowed_counts_are_multiples_of_tokens_and_everything() -> None:
    assert allowed(1, 64, 196) == (63, 127, 191, 196)
    assert allowed(5, 4, 10) == (3, 7, 10)
    assert allowed(0, 8, 16) == (8, 16)
    assert allowed(1, 1, 4) == (1, 2, 3, 4)
    assert allowed(1, 64, 16) == (16,), "too coarse to prune at all"


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("multiple", [1, 3, 8, 16, 32])
def test_aligned_counts_are_allowed_never_rise_and_stay_near(multiple: int, halves: bool) -> None:
    wanted = kept(196, linear_ramp(12), 0.7)
    found = aligned(wanted, 1, multiple, 196, halves=halves)
    assert set(found) <= set(allowed(1, multiple, 196))
    assert never_rises((196, *found))
    assert all(abs(got - want) < multiple for got, want in zip(found, wanted, strict=True))


def test_aligned_counts_halve_at_most_where_asked() -> None:
    found = aligned((60, 10, 10), 1, 32, 196, halves=True)
    assert found == halved_at_most(found, 196)
    assert set(found) <= set(allowed(1, 32, 196))
    assert found[0] >= 98
    assert aligned((60, 10, 10), 1, 32, 196) == (63, 31, 31)


def test_aligning_to_one_changes_nothing() -> None:
    counts = kept(196, linear_ramp(12), 0.7)
    assert aligned(counts, 1, 1, 196) == counts


@pytest.mark.parametrize("multiple", [4, 8, 16])
def test_an_aligned_budget_is_met_within_a_percent(host: Host, multiple: int) -> None:
    if host.num_patches < 100 and multiple > 8:
        return
    costs = cost_model(host)
    for target in (0.9, 0.6, 0.5):
        patches = solve_macs(
            costs,
            lambda strength: kept(costs.num_patches, linear_ramp(host.depth), strength),
            target * costs.dense,
            costs.dense,
            multiple=multiple,
        )
        assert costs.total(patches) == pytest.approx(target * costs.dense, rel=0.01)
        assert never_rises((host.num_patches, *patches))
        assert set(patches[:-1]) <= set(allowed(host.num_prefix, multiple, host.num_patches))
        assert len(set(patches)) <= host.num_patches // multiple + 2


def test_the_last_block_makes_up_for_what_a_coarse_grid_cannot_spend() -> None:
    costs = cost_model(open_host(tiny_vit(depth=4, img_size=(112, 112))))
    budget = 0.63 * costs.dense
    patches = solve_macs(costs, lambda s: kept(196, linear_ramp(4), s), budget, costs.dense, multiple=64)
    assert costs.total(patches) == pytest.approx(budget, rel=0.01)
    assert set(patches[:-1]) <= set(allowed(1, 64, 196))
    assert patches[-1] not in allowed(1, 64, 196)


def test_a_budget_out_of_reach_of_a_coarse_grid_says_that_a_finer_one_may_do() -> None:
    costs = cost_model(open_host(tiny_vit()))
    with pytest.raises(BudgetError, match=r"macs=0.3 cannot be met .*; or align to fewer than 32 tokens"):
        solve_macs(costs, lambda s: kept(35, linear_ramp(3), s), 0.3 * costs.dense, costs.dense, multiple=32)


def test_no_block_of_a_halved_schedule_removes_more_than_half() -> None:
    assert halved_at_most((60, 10, 10), 196) == (98, 49, 25)
    assert halved_at_most((1, 1, 1), 7) == (4, 2, 1)
    assert halved_at_most((150, 90, 90), 196) == (150, 90, 90), "nothing to change"
    assert halved_at_most((90, 120, 40), 196) == (98, 98, 49), "it never rises"


def test_between_two_multiples_at_the_same_distance_the_smaller_is_taken() -> None:
    assert aligned((175, 47, 48), 1, 32, 196) == (159, 31, 31)
    assert allowed(1, 32, 196)[4:] == (159, 191, 196)


def test_a_step_knows_its_depth_what_to_score_and_whether_patches_were_removed_before() -> None:
    cumulative = make_steps(method_named("cpvit"), (10, 8, 8, 5, 5), 10)
    assert [step.depth for step in cumulative] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert [step.score for step in cumulative] == [True, True, True, True, False]
    assert [step.pruned for step in cumulative] == [False, False, True, True, True]
    assert [step.keep for step in cumulative] == [10, 8, 8, 5, 5]
    of_the_block = make_steps(method_named("topk"), (10, 8, 8, 5, 5), 10)
    assert [step.score for step in of_the_block] == [False, True, False, True, False]
    assert not any(step.score for step in make_steps(method_named("tome"), (10, 8, 8, 5, 5), 10))
    assert not any(step.score for step in make_steps(method_named("cpvit"), (10,) * 5, 10))


def test_rounding_is_settled_in_as_many_steps_as_it_takes() -> None:
    costs: Any = SimpleNamespace(
        num_patches=100, num_prefix=0, tolerance=0.0, method=method_named("cpvit"), total=sum
    )
    assert _settle(costs, (50, 50), 90, 1) == (45, 45), "a stage of equal counts moves as one"
    assert sum(_settle(costs, (50, 50), 91, 1)) == 91, "then single blocks"
