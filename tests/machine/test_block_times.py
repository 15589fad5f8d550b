"""Times of blocks: what is measured, what is remembered, and what follows from it. The clock is made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import tiny_vit

from cpvit.adapters import Host, open_host
from cpvit.machine.align import best_align
from cpvit.machine.block_profiler import BlockProfiler, Piece
from cpvit.machine.time_model import predict_seconds, time_model
from cpvit.machine.timer import Run, least_seconds
from cpvit.machine.timing_cache import TimesError, cache_folder
from cpvit.methods import METHODS, method_named
from cpvit.plans.budget import BudgetError, solve_macs
from cpvit.plans.config import PruneConfig
from cpvit.plans.schedules import kept, linear_ramp

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cpvit"


class Clock:
    """Runs everything once and says it took a second, or what it is told."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self.timed = 0

    def __call__(self, runs: Sequence[Run], device: torch.device) -> list[float]:
        self.timed += len(runs)
        with torch.inference_mode():
            for run in runs:
                run()
        return [self.seconds] * len(runs)


class Priced(BlockProfiler):
    """A workbench on which a block takes a millisecond per patch, and more where that is no multiple of 8."""

    waste = 0.5

    def seconds(self, wanted: Sequence[Piece]) -> dict[Piece, float]:
        return {piece: self._price(piece) for piece in wanted}

    def _price(self, piece: Piece) -> float:
        if piece.kind == "model":
            return 0.0
        uneven = (piece.patches + self.host.num_prefix) % 8 and piece.patches < self.host.num_patches
        removal = 0.002 if piece.kind == "remove" else 0.0
        return piece.patches / 1000 * (1 + self.waste * bool(uneven)) + removal


def square(depth: int = 4) -> Host:
    return open_host(tiny_vit(depth=depth, img_size=(112, 112)))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_timed_and_priced(method: str) -> None:
    clock = Clock()
    bench = BlockProfiler(open_host(tiny_vit()), method_named(method), 2, timer=clock)
    times = time_model(bench)
    assert clock.timed > 20
    assert times.total([20, 10, 5]) > 0
    assert (times.num_patches, times.num_prefix, times.method) == (35, 1, method_named(method))
    assert predict_seconds(bench, [(20, 10, 5), (35, 35, 35)])[0] > 0


def test_blocks_that_are_given_more_than_tokens_can_be_timed() -> None:
    """A rotary embedding, of which those that are left take their rows."""
    host = open_host(timm.create_model("eva02_tiny_patch14_224", img_size=70, depth=2).eval())
    bench = BlockProfiler(host, method_named("cpvit-merge"), 1, timer=Clock())
    assert time_model(bench).total([20, 10]) > 0


def test_what_was_measured_is_not_measured_again(cache: Path) -> None:
    clock = Clock()
    first = time_model(BlockProfiler(open_host(tiny_vit()), method_named("tome"), 2, timer=clock))
    timed = clock.timed
    again = time_model(BlockProfiler(open_host(tiny_vit()), method_named("tome"), 2, timer=clock))
    assert again == first
    assert clock.timed == timed
    time_model(BlockProfiler(open_host(tiny_vit()), method_named("tome"), 3, timer=clock))
    assert clock.timed == 2 * timed, "another batch is another question"
    (small, large) = sorted(json.loads(file.read_text())["of"] for file in cache.iterdir())
    assert "batch 2, float64 on " in small
    assert "batch 3, float64 on " in large


def test_a_slower_day_is_told_by_the_reference() -> None:
    host, clock = open_host(tiny_vit()), Clock(1.0)
    full, half = Piece("plain", 0, 35), Piece("plain", 0, 20)
    bench = BlockProfiler(host, method_named("cpvit"), 2, timer=clock)
    assert bench.seconds([full]) == {full: 1.0}
    clock.seconds = 4.0
    assert bench.seconds([full, half]) == {full: 1.0, half: 1.0}


def test_it_says_what_it_is_going_to_time_and_where_it_keeps_it(cache: Path) -> None:
    said: list[str] = []
    bench = BlockProfiler(
        open_host(tiny_vit()), method_named("cpvit"), 2, on_message=said.append, timer=Clock()
    )
    bench.seconds([Piece("model")])
    bench.seconds([Piece("model")])
    (line,) = said
    assert line.startswith("timing 1 pieces of vit_tiny_patch16_224 at batch 2, once: kept in ")
    assert str(cache) in line


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_vit().train()
    before = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    time_model(BlockProfiler(open_host(model), method_named("cpvit-merge"), 2, timer=Clock()))
    assert model.training
    assert before == {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}


def test_a_file_of_something_else_is_not_overwritten() -> None:
    bench = BlockProfiler(open_host(tiny_vit()), method_named("cpvit"), 2, timer=Clock())
    bench.cache.path.parent.mkdir()
    bench.cache.path.write_text("precious")
    with pytest.raises(TimesError, match=r"does not hold block times; delete it to have them measured again"):
        BlockProfiler(open_host(tiny_vit()), method_named("cpvit"), 2)
    assert bench.cache.path.read_text() == "precious"


def test_a_cache_that_cannot_be_written_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cpvit.machine.timing_cache.write_atomically", fail)
    bench = BlockProfiler(open_host(tiny_vit()), method_named("cpvit"), 2, timer=Clock())
    with pytest.raises(
        TimesError, match=r"\(Permission denied\); set XDG_CACHE_HOME to a folder .* --align none"
    ):
        bench.seconds([Piece("model")])


def test_the_cache_lies_where_the_desktop_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cpvit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "cpvit"


def test_the_least_disturbed_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now, disturbances = [0.0], iter([9.0, 3.0, 5.0, 2.0, 4.0, 6.0, 7.0])

    def work() -> None:
        now[0] += next(disturbances)

    monkeypatch.setattr("cpvit.machine.timer.time.perf_counter", lambda: now[0])
    assert least_seconds([work], CPU) == [2.0]


def test_time_falls_with_the_patches_and_grows_with_every_removal() -> None:
    times = time_model(Priced(square(), method_named("tome"), 2), multiple=8)
    assert times.dense == pytest.approx(4 * 0.196, rel=0.01)
    assert times.total([95] * 4) < times.total([191] * 4) < times.dense
    staged, at_once = times.total([191, 183, 175, 167]), times.total([175, 175, 175, 175])
    assert staged > at_once, "four removals cost more than one, although as many patches leave on average"


def test_a_time_budget_is_met_like_one_of_macs() -> None:
    times = time_model(Priced(square(), method_named("cpvit"), 2), multiple=8)
    budget = 0.6 * times.dense
    counts = solve_macs(times, lambda s: kept(196, linear_ramp(4), s), budget, times.dense, multiple=8)
    assert times.total(counts) == pytest.approx(budget, rel=times.tolerance)
    assert all((count + 1) % 8 == 0 for count in counts[:-1])


def test_prediction_prefers_counts_that_the_machine_likes() -> None:
    bench = Priced(square(), method_named("cpvit"), 2)
    uneven, even = predict_seconds(bench, [(151, 131, 111, 91), (151, 135, 111, 87)])
    assert even < uneven


@pytest.mark.parametrize(("waste", "multiple"), [(0.5, 8), (0.0, 1)])
def test_auto_aligns_where_that_is_worth_it(
    waste: float, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Priced, "waste", waste)
    monkeypatch.setattr("cpvit.machine.align.BlockProfiler", Priced)
    monkeypatch.setattr("cpvit.machine.align.ALIGN_CANDIDATES", (4, 8))
    assert best_align(square(), PruneConfig(macs=0.6, align="auto")) == multiple


@pytest.mark.parametrize("config", [PruneConfig(keep_rate=1), PruneConfig(keep_per_block=(30, 20, 10))])
def test_auto_measures_nothing_where_there_is_nothing_to_choose(
    config: PruneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpvit.machine.align.BlockProfiler", lambda *_, **__: pytest.fail("measured"))
    assert best_align(open_host(tiny_vit()), config) == 1


def test_auto_says_that_a_budget_is_out_of_reach_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpvit.machine.align.BlockProfiler", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(BudgetError, match=r"macs=0.01 cannot be met"):
        best_align(square(), PruneConfig(macs=0.01))
