"""The search: every candidate meets the budget, and what is found is no worse than what it began with."""

from __future__ import annotations

import pytest
from conftest import tiny_vit

from cpvit.adapters import open_host
from cpvit.methods import method_named
from cpvit.plans.costs import cost_model
from cpvit.plans.schedules import halved_at_most, linear_ramp
from cpvit.tuning.search import Budget, Counts, search, starting_shapes


def budget(macs: float = 0.6, method: str = "cpvit", depth: int = 6) -> Budget:
    host = open_host(tiny_vit(depth=depth, img_size=(112, 112)))
    return Budget(cost_model(host, method=method_named(method)), macs, cost_model(host).dense)


def late(counts: Counts) -> float:
    """A damage that is least when everything leaves in the last blocks."""
    return float(sum((196 - count) * (len(counts) - block) ** 2 for block, count in enumerate(counts)))


@pytest.mark.parametrize("method", ["cpvit", "cpvit-merge", "tome"])
def test_every_candidate_meets_the_budget(method: str) -> None:
    within = budget(0.6, method)
    judged: list[Counts] = []

    def damage(counts: Counts) -> float:
        judged.append(counts)
        return late(counts)

    search(within, damage, starts=starting_shapes(6, linear_ramp(6)), trials=40, seed=0)
    assert 20 < len(judged) <= 40
    for counts in judged:
        assert within.costs.total(counts) == pytest.approx(0.6 * within.dense, rel=0.005)
        assert list(counts) == sorted(counts, reverse=True)
        assert method != "tome" or counts == halved_at_most(counts, 196)


def test_it_improves_on_where_it_began_and_says_by_how_much() -> None:
    found = search(budget(), late, starts=[linear_ramp(6)], trials=80, seed=0)
    assert found.objective < late(found.start)
    assert found.objective == late(found.patches)
    assert found.evaluations <= 80


def test_the_seed_decides() -> None:
    first, second = (search(budget(), late, starts=[linear_ramp(6)], trials=30, seed=3) for _ in range(2))
    assert first == second


def test_no_schedule_is_judged_twice() -> None:
    judged: list[Counts] = []
    search(
        budget(),
        lambda counts: judged.append(counts) or late(counts),
        starts=[linear_ramp(6)] * 3,
        trials=25,
        seed=0,
    )
    assert len(judged) == len(set(judged))


def test_progress_is_told_after_every_judgement() -> None:
    told: list[tuple[int, float]] = []
    search(
        budget(),
        late,
        starts=[linear_ramp(6)],
        trials=12,
        seed=0,
        on_trial=lambda n, best: told.append((n, best)),
    )
    assert [number for number, _ in told] == list(range(1, 13))
    assert [best for _, best in told] == sorted((best for _, best in told), reverse=True)


def test_a_family_may_empty_the_last_block() -> None:
    shapes = starting_shapes(6, linear_ramp(6))
    assert any(budget().counts(shape)[-1] < budget().counts(shape)[-2] / 2 for shape in shapes)
