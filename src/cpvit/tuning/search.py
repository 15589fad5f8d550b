"""Search for the schedule with the least objective for a budget.

A candidate is a *shape* over depth (see :mod:`cpvit.plans.schedules`); every shape is brought to the budget before it
is evaluated, so all candidates cost the same. The search starts from a handful of shapes (the attention range among
them) and then moves pruning from block to block, in steps that get finer, keeping what helps.

Every evaluated schedule is cached by its counts. The cache can be kept on disk, so an interrupted search that is
started again with the same inputs replays what it knows and goes on from there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeAlias

from cpvit.plans.budget import solve_macs
from cpvit.plans.costs import Costs
from cpvit.plans.schedules import constant, halved_at_most, linear_ramp

Counts = tuple[int, ...]
Shape = tuple[float, ...]
OnTrial: TypeAlias = Callable[[int, float], None]
"""Told the number of schedules evaluated and the least objective so far."""

FIRST_STEP = 0.12
"""Share of the pruning that a move takes from one block to another at first; halved when nothing helps."""
LAST_STEP = 0.01
EVERYTHING = 1e6
"""Share gone that leaves a single patch at any strength."""


@dataclass(frozen=True)
class SearchResult:
    """Best schedule found, and how it was found."""

    patches: Counts
    objective: float
    start: Counts
    """The best starting shape's."""
    evaluations: int
    """Schedules that were evaluated."""


class Budget:
    """Brings shapes to a budget: a share ``macs`` of ``dense``, in MACs or whatever ``costs`` counts."""

    def __init__(self, costs: Costs, macs: float, dense: float, *, multiple: int = 1) -> None:
        self.costs = costs
        self.macs = macs
        self.dense = dense
        self.multiple = multiple

    def counts(self, shape: Shape) -> Counts:
        """Patches leaving each block for this shape, at the budget."""
        total = self.costs.num_patches

        def at(strength: float) -> Counts:
            kept = (max(1, round(total * (1 - min(1.0, strength * gone)))) for gone in shape)
            falling = tuple(accumulate(kept, min))
            return halved_at_most(falling, total) if self.costs.method.halves else falling

        return solve_macs(self.costs, at, self.macs * self.dense, self.dense, multiple=self.multiple)


def search(
    budget: Budget,
    objective: Callable[[Counts], float],
    *,
    starts: Sequence[Shape],
    trials: int,
    seed: int,
    on_trial: OnTrial = lambda evaluations, best: None,
) -> SearchResult:
    """Find the schedule with the least objective.

    Args:
        budget: What every candidate may cost.
        objective: Of a schedule; may cache.
        starts: Shapes to begin with.
        trials: Schedules to evaluate at most.
        seed: Of the order in which moves are tried.
        on_trial: Called with the number evaluated so far and the least objective.
    """
    evaluate = _Trials(objective, trials, on_trial)
    scored = [(evaluate(budget.counts(shape)), shape) for shape in starts[:trials]]
    best, shape = min(scored, key=lambda pair: pair[0])
    start, step, order = budget.counts(shape), FIRST_STEP, random.Random(seed)
    while step >= LAST_STEP and not evaluate.exhausted:
        before = best
        for move in _moves(len(shape), order):
            best, shape = _follow(move, shape, step, best, budget, evaluate)
        step = step if best < before else step / 2
    return SearchResult(budget.counts(shape), best, start, evaluate.count)


def _follow(
    move: _Move, shape: Shape, step: float, best: float, budget: Budget, evaluate: _Trials
) -> tuple[float, Shape]:
    """Make a move again and again while it helps."""
    while not evaluate.exhausted:
        candidate = _moved(shape, move, step)
        value = evaluate(budget.counts(candidate))
        if value >= best:
            break
        best, shape = value, candidate
    return best, shape


class _Trials:
    """Counts and caches evaluations."""

    def __init__(self, objective: Callable[[Counts], float], trials: int, on_trial: OnTrial) -> None:
        self.objective = objective
        self.trials = trials
        self.on_trial = on_trial
        self.known: dict[Counts, float] = {}

    @property
    def count(self) -> int:
        return len(self.known)

    @property
    def exhausted(self) -> bool:
        return self.count >= self.trials

    def __call__(self, counts: Counts) -> float:
        if counts not in self.known:
            self.known[counts] = self.objective(counts)
            self.on_trial(self.count, min(self.known.values()))
        return self.known[counts]


def starting_shapes(depth: int, layer_aware: Shape) -> tuple[Shape, ...]:
    """Shapes to begin with: by attention range, by depth, constant; each also with the last block emptied.

    What leaves in the last block can do no harm where only prefix tokens are read after it.
    """
    shapes = (layer_aware, linear_ramp(depth), constant(depth), _early(depth))
    return tuple(option for shape in shapes for option in (shape, _emptied(shape)))


def _early(depth: int) -> Shape:
    return tuple(((block + 1) / depth) ** 0.5 for block in range(depth))


def _emptied(shape: Shape) -> Shape:
    return (*shape[:-1], EVERYTHING)


class _Move(NamedTuple):
    """One block prunes more (or less) than before; all others make up for it when the budget is met."""

    block: int
    sign: int


def _moves(depth: int, order: random.Random) -> list[_Move]:
    moves = [_Move(block, sign) for block in range(depth) for sign in (1, -1)]
    order.shuffle(moves)
    return moves


def _moved(shape: Shape, move: _Move, step: float) -> Shape:
    """The shape after a move. More in the last block means everything: what leaves there is often not missed."""
    last = len(shape) - 1
    if move == (last, 1):
        return _emptied(shape)
    removal = [later - earlier for earlier, later in zip((0.0, *shape), shape, strict=False)]
    if move.block == last and shape[last] >= EVERYTHING:
        return (*shape[:-1], shape[-2] if last else 1.0)
    amount = step * shape[max(0, last - 1)]
    removal[move.block] = max(0.0, removal[move.block] + move.sign * amount)
    return tuple(accumulate(removal))
