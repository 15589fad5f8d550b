"""From a speed-up, measured on this machine, to the plan that reaches it and stays closest to the dense model.

The search needs the cost of a schedule before it is run: :class:`cpvit.machine.time_model.TimeModel` predicts it from
blocks that were timed alone. A prediction is not a result. So the real model, pruned by the plan, is timed in turn
with the dense one; where it falls short, the budget is tightened by what was missing, and the search begins again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from cpvit.adapters import Host
from cpvit.machine.align import best_align
from cpvit.machine.block_profiler import BlockProfiler
from cpvit.machine.environment import Environment, describe_environment
from cpvit.machine.time_model import TimeModel, time_model
from cpvit.machine.timer import OnMessage
from cpvit.measure.benchmark import BenchmarkOptions, benchmark
from cpvit.measure.timings import Speedup
from cpvit.methods import method_named
from cpvit.plans.budget import BudgetError
from cpvit.plans.config import Align, PruneConfig
from cpvit.plans.costs import cost_model
from cpvit.plans.plan import Plan
from cpvit.plans.resolve import make_plan
from cpvit.plans.schedules import aligned, curve_of
from cpvit.pruning.opening import open_restored
from cpvit.tuning.evaluator import PlanEvaluator
from cpvit.tuning.search import Budget, Counts, OnTrial
from cpvit.tuning.target import Target, Tuned
from cpvit.tuning.tune import TuneOptions, tune_on

CLOSE = 1.03
"""The budget is good enough to search with when a plan at it is at most 3% faster than wanted."""
MARGIN = 0.995
"""A tightened budget aims half a percent beyond what was wanted."""
GENTLEST = 0.98
"""Largest share of the dense time that is tried."""

Measure = Callable[[Plan], Speedup]


class SpeedupError(ValueError):
    """A speed-up that no plan reached."""


@dataclass(frozen=True)
class SpeedTuned:
    """A plan and the speed-up that was measured with it."""

    tuned: Tuned
    speedup: Speedup
    """Dense over pruned time, taken in every round."""
    wanted: float
    batch_size: int
    searches: int
    """How often the budget was searched at; each after the first was tightened."""
    environment: Environment


@dataclass(frozen=True)
class SpeedupOptions:
    """How to measure."""

    batch_size: int = 32
    """Images per forward that the speed-up is for."""
    align: Align = "auto"
    """As in :class:`cpvit.PruneConfig`."""
    searches: int = 3
    """How often to search at most."""
    seconds: float = 10.0
    """How long to measure each time."""


def tune_speedup(
    model: nn.Module,
    images: Tensor,
    speedup: float,
    options: TuneOptions | None = None,
    timing: SpeedupOptions | None = None,
    *,
    on_trial: OnTrial = lambda evaluations, best: None,
    on_message: OnMessage = lambda _: None,
    measure: Measure | None = None,
) -> SpeedTuned:
    """Find the plan closest to the dense model that is measured to be faster by a factor. The model is left untouched.

    Args:
        model: A model with a classification head, on the device and in the dtype it will run in.
        images: [B 3 H W] calibration images; 64 to 256 serve well.
        speedup: Dense over pruned time wanted.
        options: How to search; its multiple is chosen by ``timing.align``.
        timing: How to measure.
        on_trial: Called with the number of schedules evaluated and the least logit distance so far.
        on_message: Called with what is done.
        measure: Measures a plan; by default :func:`cpvit.measure.benchmark.benchmark`, median of the rounds.

    Raises:
        SpeedupError: No plan reached it; the message says what the best one did.
        ValueError: The model has no classification head to compare.
    """
    wanted = Target(speedup=speedup).speedup or speedup
    options = TuneOptions() if options is None else options
    timing = SpeedupOptions() if timing is None else timing
    host = open_restored(model)
    multiple = _multiple(host, options, timing, on_message)
    profiler = BlockProfiler(host, method_named(options.method), timing.batch_size, on_message=on_message)
    times = time_model(profiler, multiple=multiple)

    def timed(plan: Plan) -> Speedup:
        settings = BenchmarkOptions(timing.batch_size, timing.seconds, options.seed)
        return benchmark(model, plan, settings).speedup_by_round

    record = _Record(timed if measure is None else measure, wanted, on_message)
    here = describe_environment(host.device, host.dtype, options.seed)
    evaluator = PlanEvaluator(host, images, None, options.method, options.head_keep_rate)
    search = dataclasses.replace(options, multiple=multiple)
    try:
        share = _calibrated(host, options.method, times, multiple, record)
        for number in range(1, timing.searches + 1):
            tuned = tune_on(evaluator, Target(macs=share), search, on_trial=on_trial, costs=times)
            tuned = dataclasses.replace(
                tuned, plan=dataclasses.replace(tuned.plan, dial=f"speedup={wanted:g}")
            )
            got = record.measure(tuned.plan, f"search {number}")
            if got.median >= wanted:
                return SpeedTuned(tuned, got, wanted, timing.batch_size, number, here)
            share = _tightened(share, got, wanted)
    except BudgetError:
        fewest = _plan(host, options.method, _fewest(host, options.method, multiple), multiple)
        record.measure(fewest, "as few patches as there can be")
    raise SpeedupError(_out_of_reach(host, options.method, record, timing.batch_size, here))


def _multiple(host: Host, options: TuneOptions, timing: SpeedupOptions, on_message: OnMessage) -> int:
    if timing.align == "auto":
        config = PruneConfig(method=options.method)
        return best_align(host, config, batch_size=timing.batch_size, on_message=on_message)
    return timing.align if isinstance(timing.align, int) else 1


class _Record:
    """Measures plans and keeps the fastest."""

    def __init__(self, measure: Measure, wanted: float, on_message: OnMessage) -> None:
        self._measure = measure
        self.wanted = wanted
        self.on_message = on_message
        self.best: tuple[Plan, Speedup] | None = None

    def measure(self, plan: Plan, title: str) -> Speedup:
        got = self._measure(plan)
        self.on_message(
            f"{title}: {got.median:.3f}x measured ({got.p10:.3f}x to {got.p90:.3f}x), {self.wanted:g}x wanted, "
            f"{100 * plan.macs_ratio:.1f}% of the MACs"
        )
        if self.best is None or got.median > self.best[1].median:
            self.best = plan, got
        return got


def _calibrated(host: Host, method: str, times: TimeModel, multiple: int, record: _Record) -> float:
    """Share of the predicted dense time at which a plan is measured to be as fast as wanted, but hardly faster.

    A plan that needs no search stands in, since one search takes longer than many measurements.
    """
    share = min(GENTLEST, 1 / record.wanted)
    for number in (1, 2, 3):
        budget = Budget(times, share, times.dense, multiple=multiple, empty_last=host.discards_patches)
        counts = budget.of_curve(curve_of(method_named(method)), host.depth)
        got = record.measure(_plan(host, method, counts, multiple), f"without a search, {number}")
        if record.wanted <= got.median <= CLOSE * record.wanted:
            break
        share = _tightened(share, got, record.wanted)
    return share


def _tightened(share: float, got: Speedup, wanted: float) -> float:
    """The share corrected by what was measured at it; gentler where that was faster than wanted."""
    return min(GENTLEST, MARGIN * share * got.median / wanted)


def _plan(host: Host, method: str, counts: Counts, multiple: int) -> Plan:
    costs = cost_model(host, method=method_named(method))
    plan = make_plan(host, PruneConfig(method=method, keep_per_block=counts))
    return dataclasses.replace(plan, align=multiple, macs_ratio=costs.total(counts) / costs.dense)


def _fewest(host: Host, method: str, multiple: int) -> Counts:
    halves = method_named(method).halves
    return aligned([1] * host.depth, host.num_prefix, multiple, host.num_patches, halves=halves)


def _out_of_reach(host: Host, method: str, record: _Record, batch_size: int, here: Environment) -> str:
    assert record.best is not None, "something was measured"
    plan, best = record.best
    return (
        f"no plan of {method} made {host.name} faster by {record.wanted:g} at batch {batch_size} in {here.dtype} on "
        f"{here.device_name}: the best measured was {best.median:.2f}x ({best.p10:.2f}x to {best.p90:.2f}x), with "
        f"{100 * plan.macs_ratio:.1f}% of the MACs; ask for less, or for a larger batch"
    )
