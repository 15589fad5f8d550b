"""From a wanted speed-up to a plan. The clock is made up: what counts is what is done with what it says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_vit

from cpvit import plan_of
from cpvit.measure.timings import Speedup
from cpvit.plans.plan import Plan
from cpvit.tuning.speedup import SpeedTuned, SpeedupError, SpeedupOptions, tune_speedup
from cpvit.tuning.target import Target
from cpvit.tuning.tune import TuneOptions, tune


@pytest.fixture(autouse=True)
def made_up_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A block takes a second for every patch, whatever is done with it; nothing outside the blocks takes time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        "cpvit.machine.block_profiler.BlockProfiler.seconds",
        lambda self, wanted: {
            piece: float(piece.patches) / (2 if piece.kind == "mlp" else 1) for piece in wanted
        },
    )


def images() -> torch.Tensor:
    return torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def model() -> Any:
    return tiny_vit(depth=4, img_size=(112, 112))


def by_patches(strength: float) -> Callable[[Plan], Speedup]:
    """A machine that makes of the patches saved a share ``strength`` of what was predicted."""

    def measure(plan: Plan) -> Speedup:
        counts = (plan.num_patches, *plan.patches_per_block)
        steps = itertools.pairwise(counts)
        spent = sum((old + new) / 2 for old, new in steps) / (plan.num_patches * len(plan.patches_per_block))
        got = 1 / (1 - strength * (1 - spent))
        return Speedup(got, got * 0.98, got * 1.02)

    return measure


def find(wanted: float, measure: Callable[[Plan], Speedup], *, searches: int = 3, **told: Any) -> SpeedTuned:
    timing = SpeedupOptions(batch_size=2, align=8, searches=searches)
    return tune_speedup(model(), images(), wanted, TuneOptions(trials=4), timing, measure=measure, **told)


def test_the_plan_is_as_fast_as_wanted() -> None:
    found = find(1.5, by_patches(1.0))
    assert 1.5 <= found.speedup.median < 1.6
    assert found.tuned.plan.dial == "speedup=1.5"
    assert found.tuned.plan.align == 8
    assert all((count + 1) % 8 == 0 or count == 196 for count in found.tuned.plan.patches_per_block[:-1])


def test_a_machine_that_saves_less_than_predicted_is_given_less_to_do() -> None:
    lazy, eager = find(1.4, by_patches(0.7)), find(1.4, by_patches(1.0))
    assert lazy.speedup.median >= 1.4
    assert lazy.tuned.plan.macs_ratio < eager.tuned.plan.macs_ratio - 0.05


def test_a_search_that_falls_short_is_made_again_with_a_tighter_budget() -> None:
    """What is searched is measured slower here than what is not: the budget found without a search is too wide."""
    honest, ratios = by_patches(1.0), []

    def measure(plan: Plan) -> Speedup:
        got = honest(plan).median * (0.93 if plan.schedule == "search" else 1)
        if plan.schedule == "search":
            ratios.append(plan.macs_ratio)
        return Speedup(got, got, got)

    found = find(1.5, measure)
    assert found.searches == len(ratios) > 1
    assert ratios[-1] < ratios[0]
    assert found.speedup.median >= 1.5


@pytest.mark.parametrize("strength", [0.1, 0.0])
def test_out_of_reach_is_said_with_the_best_that_was(strength: float) -> None:
    told: list[str] = []
    with pytest.raises(SpeedupError) as caught:
        find(1.5, by_patches(strength), on_message=told.append)
    text = str(caught.value)
    assert text.startswith(
        "no plan of cpvit-merge made vit_tiny_patch16_224 faster by 1.5 at batch 2 in float64 on "
    )
    assert f"the best measured was {'1.09x' if strength else '1.00x'} (" in text
    assert text.endswith("; ask for less, or for a larger batch")
    assert "1.5x wanted" in told[-1]


def test_searches_that_all_fall_short_end_in_an_error() -> None:
    def measure(plan: Plan) -> Speedup:
        got = 1.2 if plan.schedule == "search" else 1.51
        return Speedup(got, got, got)

    with pytest.raises(SpeedupError, match=r"the best measured was 1.51x"):
        find(1.5, measure, searches=1)


def test_the_model_is_left_untouched() -> None:
    network = model()
    before = network(images())
    tune_speedup(
        network,
        images(),
        1.3,
        TuneOptions(trials=2),
        SpeedupOptions(batch_size=1, align="none"),
        measure=by_patches(1.0),
    )
    assert plan_of(network) is None
    assert torch.equal(network(images()), before)


def test_a_speedup_has_to_be_one() -> None:
    with pytest.raises(ValueError, match=r"speedup must be above 1, got 0.9"):
        find(0.9, by_patches(1.0))


def test_what_has_to_be_measured_is_not_for_the_search_alone() -> None:
    with pytest.raises(
        ValueError, match=r"a speed-up has to be measured: call cpvit.tuning.speedup.tune_speedup"
    ):
        tune(model(), images(), Target(speedup=1.5))
