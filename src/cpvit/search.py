"""Search for the schedule that does the least damage for a budget, on calibration images.

A candidate is a *shape* over depth (see :mod:`cpvit.schedule`); every shape is brought to the budget before it is
judged, so all candidates cost the same. The search starts from a handful of shapes (the attention range among
them) and then moves pruning from block to block, in steps that get finer, keeping what helps.

Every judged schedule is remembered by its counts. The memory can be written down after each judgement, so an
interrupted search that is started again with the same inputs replays what it knows and goes on from there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from cpvit.macs import Costs
from cpvit.schedule import constant, halved_at_most, linear_ramp, solve_macs

Counts = tuple[int, ...]
Shape = tuple[float, ...]

FIRST_STEP = 0.12
"""Share of the pruning that a move takes from one block to another at first; halved when nothing helps."""
LAST_STEP = 0.01
EVERYTHING = 1e6
"""Share gone that leaves a single patch at any strength."""


@dataclass(frozen=True)
class SearchResult:
    """Best schedule found, and how it was found."""

    patches: Counts
    damage: float
    start: Counts
    """The best starting shape's."""
    judged: int
    """Schedules that were judged."""


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
    damage: Callable[[Counts], float],
    *,
    starts: Sequence[Shape],
    trials: int,
    seed: int,
    on_judged: Callable[[int, float], None] = lambda judged, best: None,
) -> SearchResult:
    """Find the schedule of least damage.

    Args:
        budget: What every candidate may cost.
        damage: Judges a schedule; may remember.
        starts: Shapes to begin with.
        trials: Schedules to judge at most.
        seed: Of the order in which moves are tried.
        on_judged: Told the number judged so far and the least damage.
    """
    judge = _Judge(damage, trials, on_judged)
    scored = [(judge(budget.counts(shape)), shape) for shape in starts[:trials]]
    best, shape = min(scored, key=lambda pair: pair[0])
    start, step, order = budget.counts(shape), FIRST_STEP, random.Random(seed)
    while step >= LAST_STEP and not judge.exhausted:
        before = best
        for move in _moves(len(shape), order):
            best, shape = _follow(move, shape, step, best, budget, judge)
        step = step if best < before else step / 2
    return SearchResult(budget.counts(shape), best, start, judge.judged)


def _follow(
    move: _Move, shape: Shape, step: float, best: float, budget: Budget, judge: _Judge
) -> tuple[float, Shape]:
    """Make a move again and again while it helps."""
    while not judge.exhausted:
        candidate = _moved(shape, move, step)
        value = judge(budget.counts(candidate))
        if value >= best:
            break
        best, shape = value, candidate
    return best, shape


class _Judge:
    """Counts and caches judgements."""

    def __init__(
        self, damage: Callable[[Counts], float], trials: int, on_judged: Callable[[int, float], None]
    ) -> None:
        self.damage = damage
        self.trials = trials
        self.on_judged = on_judged
        self.known: dict[Counts, float] = {}

    @property
    def judged(self) -> int:
        return len(self.known)

    @property
    def exhausted(self) -> bool:
        return self.judged >= self.trials

    def __call__(self, counts: Counts) -> float:
        if counts not in self.known:
            self.known[counts] = self.damage(counts)
            self.on_judged(self.judged, min(self.known.values()))
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
