"""What a benchmark does and reports. No test looks at how long anything took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from conftest import random_images, tiny_vit

from cpvit import PruneConfig, plan_of
from cpvit.data.loader import Batch
from cpvit.machine.timer import MIN_ROUNDS, interleave
from cpvit.measure.benchmark import BenchmarkOptions, benchmark, compare
from cpvit.measure.memory import peak_memory_mib, process_peak_mib
from cpvit.measure.timings import BenchmarkResult, Comparison, Speedup, speedup_by_round, summarize
from cpvit.plans.macs import count_macs
from cpvit.pruning.calibrate import calibrate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result() -> BenchmarkResult:
    return benchmark(
        tiny_vit().float(),
        PruneConfig(keep_per_block=(30, 20, 9)),
        BenchmarkOptions(batch_size=2, seconds=0, seed=5),
    )


def test_runs_take_turns_and_first_and_last_change_places() -> None:
    calls: list[str] = []
    times = interleave([lambda: calls.append("d"), lambda: calls.append("p")], CPU, seconds=0)
    rounds = ["".join(calls[start : start + 2]) for start in range(0, len(calls), 2)]
    assert rounds[:2] == ["dp", "dp"]  # warm-up
    assert rounds[2:] == ["dp", "pd", "dp", "pd", "dp", "pd", "dp"]
    assert [len(side) for side in times] == [MIN_ROUNDS, MIN_ROUNDS]


def test_each_time_belongs_to_its_own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def wait(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("cpvit.machine.timer.time.perf_counter", lambda: clock[0])
    slow, fast = interleave([lambda: wait(3), lambda: wait(1)], CPU, seconds=36)
    assert slow == [3.0] * 9
    assert fast == [1.0] * 9


def test_progress_rises_to_the_end() -> None:
    shares: list[float] = []
    interleave([lambda: None], CPU, seconds=0, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_latency_is_summed_up_in_milliseconds() -> None:
    latency = summarize([number / 1000 for number in range(11)])
    assert (latency.median, latency.p10, latency.p90) == pytest.approx((5, 1, 9))


def test_ratios_follow_from_the_medians(result: BenchmarkResult) -> None:
    dense, pruned = result.dense, result.pruned
    assert result.speedup == pytest.approx(dense.latency_ms.median / pruned.latency_ms.median)
    assert result.speedup == pytest.approx(pruned.images_per_s / dense.images_per_s)
    assert result.efficiency == pytest.approx(result.speedup * result.macs_ratio)
    assert dense.images_per_s == pytest.approx(2 * 1000 / dense.latency_ms.median)
    for side in (dense, pruned):
        assert 0 < side.latency_ms.p10 <= side.latency_ms.median <= side.latency_ms.p90


def test_macs_are_counted_on_both_models(result: BenchmarkResult) -> None:
    assert result.dense.macs == count_macs(tiny_vit())
    assert (
        result.macs_ratio == result.pruned.macs / result.dense.macs == pytest.approx(result.plan.macs_ratio)
    )


def test_a_record_says_what_was_run(result: BenchmarkResult) -> None:
    assert result.model == "vit_tiny_patch16_224"
    assert (result.batch_size, result.image_size, result.rounds) == (2, (40, 56), MIN_ROUNDS)
    assert result.plan.patches_per_block == (30, 20, 9)
    assert (result.environment.seed, result.environment.dtype) == (5, "float32")


def test_memory_is_at_least_that_of_the_weights(result: BenchmarkResult) -> None:
    weights = sum(p.numel() * 4 for p in tiny_vit().parameters()) / 2**20
    assert result.dense.peak_memory_mib > weights
    assert result.pruned.peak_memory_mib > weights
    assert result.peak_memory_mib >= result.dense.peak_memory_mib
    assert process_peak_mib(CPU) > 0


def test_more_images_need_more_memory() -> None:
    model = tiny_vit().float()
    few, many = (peak_memory_mib(model, random_images(n, dtype=torch.float32)) for n in (1, 16))
    assert many > few


def test_the_model_is_left_untouched() -> None:
    model = tiny_vit().float()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    benchmark(model, PruneConfig(keep_rate=0.5), BenchmarkOptions(batch_size=1, seconds=0))
    assert plan_of(model) is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_training_model_is_still_one_afterwards() -> None:
    model = tiny_vit().float().train()
    benchmark(model, PruneConfig(keep_rate=0.5), BenchmarkOptions(batch_size=1, seconds=0))
    assert model.training


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_of_no_images_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
        benchmark(tiny_vit(), options=BenchmarkOptions(batch_size=size))


def test_pruning_that_does_not_fit_is_refused_before_anything_is_timed(monkeypatch: Any) -> None:
    monkeypatch.setattr("cpvit.measure.benchmark.interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(ValueError, match="needs calibration images"):
        benchmark(tiny_vit(), PruneConfig(head_keep_rate=0.5))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    configs = {
        "cpvit": PruneConfig(keep_per_block=(30, 20, 9)),
        "impossible": PruneConfig(macs=0.01),
        "tome": PruneConfig(method="tome", keep_rate=0.5, align=4),
    }
    return compare(tiny_vit().float(), configs, BenchmarkOptions(batch_size=2, seconds=0, seed=5))


def test_a_comparison_has_a_row_for_every_method_that_fits(comparison: Comparison) -> None:
    assert [row.name for row in comparison.rows] == ["cpvit", "tome"]
    assert [row.plan.align for row in comparison.rows] == [1, 4]
    (unfit,) = comparison.unfit
    assert unfit.name == "impossible"
    assert unfit.error.startswith("macs=0.01 cannot be met by pruning patches")


def test_a_row_follows_from_its_times(comparison: Comparison) -> None:
    for row in comparison.rows:
        assert row.macs_ratio == row.timing.macs / comparison.dense.macs
        assert row.efficiency == pytest.approx(row.speedup.median * row.macs_ratio)
        assert row.speedup.p10 <= row.speedup.median <= row.speedup.p90
        assert row.verdict == row.speedup.verdict


def test_a_speedup_is_taken_round_by_round() -> None:
    """A machine that slows down in the middle changes both times and not their ratio."""
    dense = [3.0] * 4 + [30.0] * 5
    pruned = [2.0] * 4 + [20.0] * 5
    assert speedup_by_round(dense, pruned) == Speedup(1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("speedup", "verdict"),
    [
        (Speedup(1.5, 1.01, 1.9), "faster"),
        (Speedup(1.5, 1.0, 1.9), "gained nothing"),
        (Speedup(0.98, 0.9, 1.0), "gained nothing"),
        (Speedup(0.9, 0.8, 0.99), "slower"),
    ],
)
def test_only_what_nine_of_ten_rounds_say_is_a_verdict(speedup: Speedup, verdict: str) -> None:
    assert speedup.verdict == verdict


def test_pruned_copies_share_the_weights_and_leave_them_alone() -> None:
    model = tiny_vit().float()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads = PruneConfig(head_keep_rate=0.4)
    calibration = calibrate(model, random_images(2, dtype=torch.float32))
    compare(
        model,
        {"heads": heads, "patches": PruneConfig()},
        BenchmarkOptions(batch_size=1, seconds=0),
        calibration=calibration,
    )
    assert [block.attn.num_heads for block in model.blocks] == [5, 5, 5]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Recorded:
    """Batches of real images, as a loader gives them."""

    num_images = 5
    skipped: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        for count in (2, 2, 1):
            yield Batch(random_images(count, dtype=torch.float32), None, ("",) * count)


def test_end_to_end_times_whole_passes_over_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: Any = Recorded()
    monkeypatch.setattr(
        "cpvit.measure.benchmark.interleave",
        lambda runs, *_: [[run() and 6.0 for run in [run] * 7] for run in runs],
    )
    result = benchmark(
        tiny_vit().float(), PruneConfig(), BenchmarkOptions(batch_size=2, seconds=0), batches=batches
    )
    assert result.end_to_end
    assert batches.passes == 14
    assert result.dense.images_per_s == pytest.approx(5 / 6)
    assert result.dense.latency_ms.median == pytest.approx(2000), "a pass is three batches"
