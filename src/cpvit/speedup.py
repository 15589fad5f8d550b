"""From a speed-up, measured on this machine, to the plan of least damage that reaches it.

The search needs the price of a schedule before it is run: :class:`cpvit.timing.TimeModel` predicts it from blocks that
were timed alone. A prediction is not a result. So the real model, pruned by the plan, is timed in turn with the dense
one; where it falls short, the budget is tightened by what was missing, and the search begins again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from cpvit.adapters import Host, open_host
from cpvit.benchmark import Speedup, benchmark
from cpvit.environment import Environment, describe_environment
from cpvit.macs import cost_model
from cpvit.methods import method_named
from cpvit.plan import Align, Plan, PruneConfig
from cpvit.planning import best_align, make_plan
from cpvit.prune import unprune_
from cpvit.schedule import BudgetError, aligned, constant
from cpvit.search import Budget, Counts
from cpvit.timing import Tell, TimeModel, Workbench, time_model
from cpvit.tune import HeadChoice, Target, Tuned, tune

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


def tune_speedup(
    model: nn.Module,
    images: Tensor,
    speedup: float,
    *,
    batch_size: int = 32,
    method: str = "cpvit-merge",
    head_keep_rate: float = 1.0,
    head_choice: HeadChoice = "damage",
    align: Align = "auto",
    trials: int = 120,
    searches: int = 3,
    seconds: float = 10.0,
    seed: int = 0,
    on_judged: Callable[[int, float], None] = lambda judged, best: None,
    tell: Tell = lambda _: None,
    measure: Measure | None = None,
) -> SpeedTuned:
    """Find the plan of least damage that is measured to be faster by a factor. The model is left untouched.

    Args:
        model: An untouched model with a classification head, on the device and in the dtype it will run in.
        images: [B 3 H W] calibration images; 64 to 256 serve well.
        speedup: Dense over pruned time wanted.
        batch_size: Images per forward that the speed-up is for.
        method: What the plan is for.
        head_keep_rate: Fraction of the heads left.
        head_choice: As in :func:`cpvit.tune.tune`.
        align: As in :class:`cpvit.PruneConfig`.
        trials: Schedules to judge in each search.
        searches: How often to search at most.
        seconds: How long to measure each time.
        seed: Of the search and of the random images that are timed.
        on_judged: Told the number of schedules judged and the least KL so far.
        tell: Told what is done.
        measure: Measures a plan; by default :func:`cpvit.benchmark.benchmark`, median of the rounds.

    Raises:
        SpeedupError: No plan reached it; the message says what the best one did.
        ValueError: The model has no classification head to compare.
    """
    wanted = Target(speedup=speedup).speedup or speedup
    unprune_(model)
    host = open_host(model)
    config = PruneConfig(method=method, head_keep_rate=head_keep_rate, align=align)
    multiple = _multiple(host, config, batch_size, tell)
    times = time_model(Workbench(host, method_named(method), batch_size, tell=tell), multiple=multiple)

    def timed(plan: Plan) -> Speedup:
        return benchmark(model, plan, batch_size=batch_size, seconds=seconds, seed=seed).speedup_by_round

    record = _Record(timed if measure is None else measure, wanted, tell)
    parameter = next(model.parameters())
    here = describe_environment(parameter.device, parameter.dtype, seed)
    try:
        share = _calibrated(host, method, times, multiple, record)
        for number in range(1, searches + 1):
            tuned = tune(
                model,
                images,
                Target(macs=share),
                method=method,
                head_keep_rate=head_keep_rate,
                head_choice=head_choice,
                trials=trials,
                seed=seed,
                on_judged=on_judged,
                multiple=multiple,
                costs=times,
            )
            tuned = dataclasses.replace(
                tuned, plan=dataclasses.replace(tuned.plan, dial=f"speedup={wanted:g}")
            )
            got = record.measure(tuned.plan, f"search {number}")
            if got.median >= wanted:
                return SpeedTuned(tuned, got, wanted, batch_size, number, here)
            share = _tightened(share, got, wanted)
    except BudgetError:
        fewest = _plan(host, method, _fewest(host, method, multiple), multiple)
        record.measure(fewest, "as few patches as there can be")
    raise SpeedupError(_out_of_reach(host, method, record, batch_size, here))


def _multiple(host: Host, config: PruneConfig, batch_size: int, tell: Tell) -> int:
    if config.align == "auto":
        plain = dataclasses.replace(config, head_keep_rate=1.0)
        return best_align(host, plain, batch_size=batch_size, tell=tell)
    return config.align if isinstance(config.align, int) else 1


class _Record:
    """Measures plans and remembers the fastest."""

    def __init__(self, measure: Measure, wanted: float, tell: Tell) -> None:
        self._measure = measure
        self.wanted = wanted
        self.tell = tell
        self.best: tuple[Plan, Speedup] | None = None

    def measure(self, plan: Plan, title: str) -> Speedup:
        got = self._measure(plan)
        self.tell(
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
        counts = Budget(times, share, times.dense, multiple=multiple).counts(constant(host.depth))
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
