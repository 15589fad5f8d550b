"""Search for the schedule closest to the dense model at a budget, without fitting the calibration images.

Every candidate is brought to the budget before it is evaluated, so all cost the same. The search starts from the
schedule that needs no images (:class:`cpvit.plans.schedules.Curve`) and moves

1. the few numbers of that curve, then
2. removal from block to block, in steps that get finer.

A hundred images cannot determine a dozen free numbers: what a schedule gains on them is partly their noise. So a move
is made only if the difference, image by image, is larger than its standard error; a move of single blocks must also
hold on both halves of the images, of which one alone would have proposed it.

Every evaluated schedule is cached by its counts. The cache can be kept on disk, so an interrupted search that is
started again with the same inputs replays what it knows and goes on from there.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, stdev
from typing import NamedTuple, TypeAlias

from cpvit.plans.budget import BudgetError, solve_macs
from cpvit.plans.costs import Costs
from cpvit.plans.schedules import Curve, emptied_last, halved_at_most

Counts: TypeAlias = tuple[int, ...]
Shape: TypeAlias = tuple[float, ...]
Distances: TypeAlias = Sequence[float]
"""Of every image from the dense model's output."""
OnTrial: TypeAlias = Callable[[int, float], None]
"""Called with the number of schedules evaluated and the least mean distance so far."""

STANDARD_ERRORS = 1.0
"""By how many standard errors a move must be better to be made."""
CURVE_STEPS = (1.0, 0.5)
"""Sizes of the moves of the curve, in units of :data:`CURVE_UNITS`."""
CURVE_UNITS = {"onset": 0.1, "fade": 1.5, "power": 1.25}
"""Added to the onset; fade and power are multiplied."""
FIRST_STEP = 0.12
"""Share of the pruning that a move takes from one block to another at first; halved when nothing helps."""
LAST_STEP = 0.03
EVERYTHING = 1e6
"""Share gone that leaves a single patch at any strength."""


@dataclass(frozen=True)
class SearchResult:
    """Best schedule found, and how it was found."""

    patches: Counts
    distance: float
    """Mean over the images."""
    start: Counts
    """The schedule that needs no images."""
    evaluations: int
    """Schedules that were evaluated."""
    curve: Curve
    """The best curve, before single blocks were moved."""


class Budget:
    """Brings schedules to a budget: a share ``macs`` of ``dense``, in MACs or whatever ``costs`` counts."""

    def __init__(
        self, costs: Costs, macs: float, dense: float, *, multiple: int = 1, empty_last: bool = False
    ) -> None:
        self.costs = costs
        self.macs = macs
        self.dense = dense
        self.multiple = multiple
        self.empty_last = empty_last
        """Whether nothing reads what leaves the last block."""

    def of_curve(self, curve: Curve, depth: int) -> Counts:
        """Patches leaving each of ``depth`` blocks by a curve, at the budget."""
        total = self.costs.num_patches

        def at(strength: float) -> Counts:
            counts = curve.counts(total, depth, strength)
            return emptied_last(counts, total, strength) if self.empty_last else counts

        return self._solve(at)

    def of_shape(self, shape: Shape) -> Counts:
        """Patches leaving each block if the share that is gone is proportional to ``shape``, at the budget."""
        total = self.costs.num_patches

        def at(strength: float) -> Counts:
            kept = (max(1, round(total * (1 - min(1.0, strength * gone)))) for gone in shape)
            return tuple(accumulate(kept, min))

        return self._solve(at)

    def _solve(self, at: Callable[[float], Counts]) -> Counts:
        total, halves = self.costs.num_patches, self.costs.method.halves

        def allowed(strength: float) -> Counts:
            return halved_at_most(at(strength), total) if halves else at(strength)

        return solve_macs(self.costs, allowed, self.macs * self.dense, self.dense, multiple=self.multiple)


class Trial(NamedTuple):
    """A schedule and how far it is from the dense model."""

    counts: Counts
    distances: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the images."""
        return fmean(self.distances)


def search(
    budget: Budget,
    distances: Callable[[Counts], Distances],
    *,
    curve: Curve,
    depth: int,
    trials: int,
    seed: int,
    on_trial: OnTrial = lambda evaluations, best: None,
) -> SearchResult:
    """Find the schedule closest to the dense model.

    Args:
        budget: What every candidate may cost.
        distances: Of a schedule, by image; may cache.
        curve: To start from.
        depth: Blocks.
        trials: Schedules to evaluate at most.
        seed: Of the order in which moves of blocks are tried.
        on_trial: Called after every evaluation.
    """
    evaluate = _Trials(distances, trials, on_trial)
    start = evaluate(budget.of_curve(curve, depth))
    best, curve = _along_curves(budget, evaluate, start, curve, depth)
    best = _along_blocks(budget, evaluate, best, seed)
    return SearchResult(best.counts, best.mean, start.counts, evaluate.count, curve)


def _along_curves(
    budget: Budget, evaluate: _Trials, best: Trial, curve: Curve, depth: int
) -> tuple[Trial, Curve]:
    for step in CURVE_STEPS:
        moved = True
        while moved:
            moved = False
            for candidate in _curves_beside(curve, step):
                if evaluate.exhausted:
                    return best, curve
                try:
                    counts = budget.of_curve(candidate, depth)
                except BudgetError:  # with few patches, budgets that one curve meets fall between another's
                    continue
                trial = evaluate(counts)
                if is_better(trial, best):
                    best, curve, moved = trial, candidate, True
    return best, curve


def _curves_beside(curve: Curve, step: float) -> Iterator[Curve]:
    """Curves in which one number has moved by a step, up and down."""
    for sign in (1, -1):
        onset = min(0.8, max(0.0, curve.onset + sign * step * CURVE_UNITS["onset"]))
        yield dataclasses.replace(curve, onset=onset)
        yield dataclasses.replace(curve, power=curve.power * CURVE_UNITS["power"] ** (sign * step))
        yield dataclasses.replace(curve, fade=curve.fade * CURVE_UNITS["fade"] ** (sign * step))


def _along_blocks(budget: Budget, evaluate: _Trials, best: Trial, seed: int) -> Trial:
    shape, order, step = _shape_of(best.counts, budget), random.Random(seed), FIRST_STEP
    while step >= LAST_STEP and not evaluate.exhausted:
        moved = False
        for move in _moves(len(shape), order):
            candidate = _moved(shape, move, step)
            if evaluate.exhausted:
                break
            try:
                counts = budget.of_shape(candidate)
            except BudgetError:  # nothing left in the shape that could be scaled to the budget
                continue
            trial = evaluate(counts)
            if is_better(trial, best) and _holds_on_both_halves(trial, best):
                best, shape, moved = trial, candidate, True
        step = step if moved else step / 2
    return best


def _shape_of(counts: Counts, budget: Budget) -> Shape:
    """The shape that gives these counts at strength 1; an emptied last block stays empty at any."""
    gone = [1 - count / budget.costs.num_patches for count in counts]
    return (*gone[:-1], EVERYTHING) if budget.empty_last else tuple(gone)


def is_better(trial: Trial, best: Trial) -> bool:
    """Whether a schedule is closer to the dense model by more than the noise of the images."""
    differences = _differences(trial, best)
    if len(differences) < 2:
        return fmean(differences) < 0
    return fmean(differences) + STANDARD_ERRORS * stdev(differences) / len(differences) ** 0.5 < 0


def _holds_on_both_halves(trial: Trial, best: Trial) -> bool:
    differences = _differences(trial, best)
    return all(not half or fmean(half) < 0 for half in (differences[::2], differences[1::2]))


def _differences(trial: Trial, best: Trial) -> list[float]:
    return [new - old for new, old in zip(trial.distances, best.distances, strict=True)]


class _Trials:
    """Counts and caches evaluations."""

    def __init__(self, distances: Callable[[Counts], Distances], trials: int, on_trial: OnTrial) -> None:
        self.distances = distances
        self.trials = trials
        self.on_trial = on_trial
        self.known: dict[Counts, Trial] = {}

    @property
    def count(self) -> int:
        return len(self.known)

    @property
    def exhausted(self) -> bool:
        return self.count >= self.trials

    def __call__(self, counts: Counts) -> Trial:
        if counts not in self.known:
            self.known[counts] = Trial(counts, tuple(self.distances(counts)))
            self.on_trial(self.count, min(trial.mean for trial in self.known.values()))
        return self.known[counts]


class _Move(NamedTuple):
    """One block prunes more (or less) than before; all others make up for it when the budget is met."""

    block: int
    sign: int


def _moves(depth: int, order: random.Random) -> list[_Move]:
    moves = [_Move(block, sign) for block in range(depth) for sign in (1, -1)]
    order.shuffle(moves)
    return moves


def _moved(shape: Shape, move: _Move, step: float) -> Shape:
    """The shape after a move; an emptied last block is filled up again by the move that takes from it."""
    last = len(shape) - 1
    if move.block == last and shape[last] >= EVERYTHING:
        return (*shape[:-1], shape[-2] if last else 1.0) if move.sign < 0 else shape
    removal = [later - earlier for earlier, later in zip((0.0, *shape), shape, strict=False)]
    amount = step * shape[max(0, last - 1)]
    removal[move.block] = max(0.0, removal[move.block] + move.sign * amount)
    return tuple(accumulate(removal))
