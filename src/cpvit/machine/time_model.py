"""How long a block takes on this machine, and what a schedule would then take.

Multiply-accumulates say little about time: a number of tokens between two multiples of the hardware's tile costs
more than the next multiple, scoring and matching take time and hardly any MACs, and small batches are bound by
what it takes to start a kernel. So blocks of the real model are timed alone, at a few numbers of tokens, on the
device, in the dtype and for the batch that will be used. What was measured once is kept as readable JSON in the
user's cache folder and not measured again.

Two questions are answered with these times: which multiple to align token counts to (:func:`predict_seconds`), and
what a schedule of a method takes (:class:`TimeModel`, which searches use in the place of MACs).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeAlias

from cpvit.adapters import Host
from cpvit.core import BlockStep, Method
from cpvit.machine.block_profiler import BlockProfiler, Piece
from cpvit.plans.schedules import allowed
from cpvit.plans.steps import make_steps

Mode: TypeAlias = Literal["plain", "score", "remove"]


Points: TypeAlias = tuple[tuple[int, float], ...]
"""(patches, seconds), rising."""


Counts: TypeAlias = tuple[int, ...]


SAMPLES = 8
"""Numbers of tokens at which a block is timed for a :class:`TimeModel`; in between lie straight lines."""


SAMPLES_PER_SCHEDULE = 4


def predict_seconds(bench: BlockProfiler, schedules: Sequence[Counts]) -> list[float]:
    """Seconds of the blocks under each schedule, from a few blocks timed at that schedule's own token counts.

    Half of a block is taken to run at what enters it and half at what leaves; a block that removes pays for that.
    This is what the multiple of an aligned schedule is chosen with, so nothing is interpolated across multiples.
    """
    total = bench.host.num_patches
    samples = [_sample(sorted(set(counts) - {total}), SAMPLES_PER_SCHEDULE) for counts in schedules]
    middle = sorted(samples[0])[len(samples[0]) // 2] if samples[0] else total
    full, at = Piece("plain", 0, total), Piece("plain", 0, middle)
    removal = Piece("remove", 0, middle, max(1, middle - max(1, middle // 16)))
    plain = {count: Piece("plain", 0, count) for sample in samples for count in sample}
    seconds = bench.seconds([full, at, removal, *plain.values()])
    extra = max(0.0, seconds[removal] - seconds[at])

    def predicted(counts: Counts, sample: Sequence[int]) -> float:
        points = (*((count, seconds[plain[count]]) for count in sample), (total, seconds[full]))
        before = (total, *counts[:-1])
        spent = sum(
            (_between(points, old) + _between(points, new)) / 2
            for old, new in zip(before, counts, strict=True)
        )
        return spent + extra * sum(new < old for old, new in zip(before, counts, strict=True))

    return [predicted(*pair) for pair in zip(schedules, samples, strict=True)]


def _sample(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, spread evenly, first and last included."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def _between(points: Points, count: int) -> float:
    """Straight lines between the points, level outside."""
    place = bisect_left(points, (count,))
    if place == len(points):
        return points[-1][1]
    if place == 0 or points[place][0] == count:
        return points[place][1]
    (low, start), (high, end) = points[place - 1], points[place]
    return start + (end - start) * (count - low) / (high - low)


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one kind of block for one batch, by patches."""

    attention: Mapping[Mode, Points]
    """Everything up to the MLP, by the patches that enter: only run, scored as well, or some removed or merged."""
    mlp: Points
    """By the patches that leave."""

    def seconds(self, mode: Mode, entering: int, keep: int) -> float:
        """Time of a block."""
        return _between(self.attention[mode], entering) + _between(self.mlp, keep)


@dataclass(frozen=True)
class TimeModel:
    """Seconds of one batch as a function of how many patches leave each block; see :class:`cpvit.plans.costs.Costs`."""

    blocks: tuple[BlockTimes, ...]
    outside: float
    """What the model takes outside its blocks."""
    num_prefix: int
    num_patches: int
    method: Method
    tolerance: float = 0.02
    """Finer would pretend that times are known better than they are."""

    def total(self, patches: Sequence[int]) -> float:
        """Seconds when ``patches[l]`` patches leave block l, scoring and matching included."""
        steps = make_steps(self.method, patches, self.num_patches)
        before = (self.num_patches, *patches[:-1])
        return self.outside + sum(
            times.seconds(_mode(step, entering), entering, step.keep)
            for times, entering, step in zip(self.blocks, before, steps, strict=True)
        )

    @property
    def dense(self) -> float:
        """Seconds with every patch kept."""
        return self.total([self.num_patches] * len(self.blocks))


def _mode(step: BlockStep, entering: int) -> Mode:
    if step.keep < entering:
        return "remove"
    return "score" if step.score else "plain"


def time_model(bench: BlockProfiler, *, multiple: int = 1) -> TimeModel:
    """Time the blocks of a model with a method, at numbers of tokens that are multiples of ``multiple``."""
    host = bench.host
    counts = _counts(host, multiple)
    kinds = sorted(set(bench.kinds))
    pieces = {kind: _pieces(bench.method, kind, counts) for kind in kinds}
    whole = Piece("model")
    seconds = bench.seconds([whole, *(piece for kind in kinds for piece in pieces[kind])])
    tables = {kind: _table(pieces[kind], seconds) for kind in kinds}
    blocks = tuple(tables[kind] for kind in bench.kinds)
    inside = sum(times.seconds("plain", host.num_patches, host.num_patches) for times in blocks)
    outside = max(0.0, seconds[whole] - inside)
    return TimeModel(blocks, outside, host.num_prefix, host.num_patches, bench.method)


def _counts(host: Host, multiple: int) -> list[int]:
    """Patches to time a block at: spread over what may be used, all of them included."""
    return _sample(allowed(host.num_prefix, multiple, host.num_patches), SAMPLES)


def _pieces(method: Method, block: int, counts: Sequence[int]) -> list[Piece]:
    lower = [max(1, count - max(1, count // 12)) for count in counts]
    removals = [
        Piece("remove", block, count, keep) for count, keep in zip(counts, lower, strict=True) if keep < count
    ]
    plain = [Piece("plain", block, count) for count in counts]
    scored = [Piece("score", block, count) for count in counts if method.cumulative]
    return [*plain, *scored, *removals, *(Piece("mlp", block, count) for count in counts)]


def _table(pieces: Sequence[Piece], seconds: Mapping[Piece, float]) -> BlockTimes:
    """Take the MLP out of every block's time; more patches never take less."""
    mlp = _rising((piece.patches, seconds[piece]) for piece in pieces if piece.kind == "mlp")

    def attention(mode: Mode) -> Points:
        return _rising(
            (
                piece.patches,
                seconds[piece] - _between(mlp, piece.patches if piece.keep is None else piece.keep),
            )
            for piece in pieces
            if piece.kind == mode
        )

    modes: tuple[Mode, ...] = ("plain", "score", "remove")
    return BlockTimes({mode: points for mode in modes if (points := attention(mode))}, mlp)


def _rising(points: Any) -> Points:
    ordered = sorted(points)
    highest = accumulate((max(0.0, seconds) for _, seconds in ordered), max)
    return tuple(zip((count for count, _ in ordered), highest, strict=True))
