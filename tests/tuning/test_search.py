"""The search: every candidate meets the budget, noise moves nothing, and what is found is no worse than the start."""

from __future__ import annotations

import random

import pytest
from conftest import tiny_vit

from cpvit.adapters import open_host
from cpvit.methods import method_named
from cpvit.plans.budget import BudgetError
from cpvit.plans.costs import cost_model
from cpvit.plans.schedules import MERGING_CURVE, Curve, halved_at_most
from cpvit.tuning.search import Budget, Counts, SearchResult, Trial, _curves_beside, is_better, search

DEPTH = 6
IMAGES = 20


def budget(macs: float = 0.6, method: str = "cpvit", *, empty_last: bool = True) -> Budget:
    host = open_host(tiny_vit(depth=DEPTH, img_size=(112, 112)))
    costs = cost_model(host, method=method_named(method))
    return Budget(costs, macs, cost_model(host).dense, empty_last=empty_last)


def late(counts: Counts) -> list[float]:
    """Distances that are least when everything leaves in the last blocks; one image as the other, nearly."""
    cost = sum((196 - count) * (len(counts) - block) ** 2 for block, count in enumerate(counts))
    return [cost * (1 + image / 1000) for image in range(IMAGES)]


def find(trials: int = 60, seed: int = 0, **options: object) -> SearchResult:
    return search(
        budget(),
        late,
        curve=MERGING_CURVE,
        depth=DEPTH,
        trials=trials,
        seed=seed,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("method", ["cpvit", "cpvit-merge", "tome"])
def test_every_candidate_meets_the_budget(method: str) -> None:
    within = budget(0.7, method)
    tried: list[Counts] = []

    def distances(counts: Counts) -> list[float]:
        tried.append(counts)
        return late(counts)

    search(within, distances, curve=MERGING_CURVE, depth=DEPTH, trials=40, seed=0)
    assert 10 < len(tried) <= 40
    assert len(tried) == len(set(tried)), "no schedule is evaluated twice"
    for counts in tried:
        assert within.costs.total(counts) == pytest.approx(0.7 * within.dense, rel=0.005)
        assert list(counts) == sorted(counts, reverse=True)
        assert method != "tome" or counts == halved_at_most(counts, 196)


def test_curves_that_cannot_meet_the_budget_are_passed_over() -> None:
    """With few patches a budget that the start meets may lie between the budgets of the curves beside it."""
    host = open_host(tiny_vit(depth=DEPTH, img_size=(32, 32)))
    costs = cost_model(host, method=method_named("cpvit-merge"))
    passed_over = 0
    for thousandth in range(320, 520, 6):
        within = Budget(costs, thousandth / 1000, cost_model(host).dense, empty_last=True)
        try:
            start = within.of_curve(MERGING_CURVE, DEPTH)
        except BudgetError:
            continue
        passed_over += sum(not meets(within, curve) for curve in _curves_beside(MERGING_CURVE, 1.0))
        found = search(within, late, curve=MERGING_CURVE, depth=DEPTH, trials=8, seed=0)
        assert found.start == start
    assert passed_over > 0


def meets(within: Budget, curve: Curve) -> bool:
    try:
        within.of_curve(curve, DEPTH)
    except BudgetError:
        return False
    return True


def test_it_starts_from_the_curve_and_improves_on_it() -> None:
    found = find()
    assert found.start == budget().of_curve(MERGING_CURVE, DEPTH)
    assert found.distance < sum(late(found.start)) / IMAGES
    assert found.distance == pytest.approx(sum(late(found.patches)) / IMAGES)
    assert found.curve.onset > MERGING_CURVE.onset, "removal that wants to be late begins later"
    assert found.evaluations <= 60


def test_the_seed_decides() -> None:
    assert find(seed=3) == find(seed=3)


def test_progress_is_told_after_every_trial() -> None:
    told: list[tuple[int, float]] = []
    find(trials=12, on_trial=lambda count, best: told.append((count, best)))
    assert [number for number, _ in told] == list(range(1, 13))
    assert [best for _, best in told] == sorted((best for _, best in told), reverse=True)


def test_noise_moves_almost_nothing() -> None:
    """Distances that have nothing to do with the schedule: a plain minimum over 60 trials would move every time."""
    moved = 0
    for seed in range(10):

        def noise(counts: Counts, seed: int = seed) -> list[float]:
            draw = random.Random(hash((counts, seed)))
            return [1 + draw.gauss(0, 0.1) for _ in range(64)]

        found = search(budget(), noise, curve=MERGING_CURVE, depth=DEPTH, trials=40, seed=seed)
        gained = 1 - found.distance
        moved += found.patches != found.start
        assert gained < 0.08
    assert moved < 10


def test_a_difference_within_its_standard_error_is_not_better() -> None:
    best = Trial((1,), (1.0, 1.0, 1.0, 1.0))
    assert is_better(Trial((1,), (0.9, 0.9, 0.91, 0.89)), best)
    assert not is_better(Trial((1,), (0.1, 1.6, 0.4, 1.8)), best), "mean 0.975, standard error 0.43"
    assert not is_better(best, best)
    assert is_better(Trial((1,), (0.9,)), Trial((1,), (1.0,))), "one image has no spread"


def test_a_move_of_one_block_must_hold_on_both_halves() -> None:
    """Even images gain, odd ones lose a little: better in the mean, and not made."""

    def one_sided(counts: Counts) -> list[float]:
        start = budget().of_curve(MERGING_CURVE, DEPTH)
        change = 0.0 if counts == start else 1.0
        return [10 - 2 * change if image % 2 == 0 else 10 + 0.1 * change for image in range(IMAGES)]

    curves = search(budget(), one_sided, curve=MERGING_CURVE, depth=DEPTH, trials=2, seed=0)
    assert curves.patches != curves.start, "the curve's own numbers may move"
    from cpvit.tuning.search import _along_blocks, _Trials

    evaluate = _Trials(one_sided, 20, lambda *_: None)
    start = evaluate(budget().of_curve(MERGING_CURVE, DEPTH))
    assert _along_blocks(budget(), evaluate, start, 0) is start


def test_an_emptied_last_block_stays_empty_where_nothing_reads_it() -> None:
    assert budget().of_curve(MERGING_CURVE, DEPTH)[-1] == 1
    assert budget(empty_last=False).of_curve(MERGING_CURVE, DEPTH)[-1] > 1
