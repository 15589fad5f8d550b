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

import hashlib
import json
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from cpvit.adapters import Host
from cpvit.cascade import make_steps
from cpvit.core import BlockStep, Method, TokenState, initial_state, run_block
from cpvit.environment import describe_environment
from cpvit.files import write_atomically
from cpvit.schedule import allowed, halved_at_most

Run: TypeAlias = Callable[[], object]
Stopwatch: TypeAlias = Callable[[Sequence[Run], torch.device], list[float]]
"""Seconds of each run."""
Tell: TypeAlias = Callable[[str], None]
Mode: TypeAlias = Literal["plain", "score", "remove"]
Points: TypeAlias = tuple[tuple[int, float], ...]
"""(patches, seconds), rising."""
Counts: TypeAlias = tuple[int, ...]

MIN_ROUNDS = 7
BLOCK_ROUNDS = 6
CUDA_REPEATS = 8
"""Calls timed at once on a GPU, which runs behind its host: alone each would also show the wait for it."""
SAMPLES = 8
"""Numbers of tokens at which a block is timed for a :class:`TimeModel`; in between lie straight lines."""
SAMPLES_PER_SCHEDULE = 4
TIMES_VERSION = 1


class TimesError(ValueError):
    """The file that block times are kept in cannot be used."""


@torch.inference_mode()
def interleave(
    runs: Sequence[Run],
    device: torch.device,
    seconds: float,
    progress: Callable[[float], None] = lambda _: None,
) -> list[list[float]]:
    """Seconds of each run, in rounds: every round times each run once, first and last changing places.

    Two rounds of warm-up are not counted.
    """
    for run in [*runs, *runs]:
        _timed(run, device)
    times: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    while len(times[0]) < MIN_ROUNDS or time.perf_counter() - start < seconds:
        order = range(len(runs)) if len(times[0]) % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            times[index].append(_timed(runs[index], device))
        spent = (time.perf_counter() - start) / max(seconds, 1e-9)
        progress(min(1.0, spent, len(times[0]) / MIN_ROUNDS))
    return times


@torch.inference_mode()
def least_seconds(runs: Sequence[Run], device: torch.device) -> list[float]:
    """Seconds of each run in the least disturbed of a few rounds; for pieces too short to show a spread."""
    repeats = CUDA_REPEATS if device.type == "cuda" else 1
    rounds = [[_timed(run, device, repeats) for run in runs] for _ in range(BLOCK_ROUNDS + 1)]
    return [min(times) / repeats for times in zip(*rounds[1:], strict=True)]


def _timed(run: Run, device: torch.device, repeats: int = 1) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_images(host: Host, batch_size: int, seed: int = 0) -> Tensor:
    """[B 3 H W] noise on the model's device and in its dtype."""
    parameter = next(host.model.parameters())
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, *host.image_shape, generator=generator)
    return images.to(parameter.device, parameter.dtype)


def cache_folder() -> Path:
    """Where block times are kept: ``$XDG_CACHE_HOME/cpvit``, by default ``~/.cache/cpvit``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "cpvit"


class Ledger:
    """Times by name, on disk. Only what is not in it is measured.

    Every measurement times a reference along, and is scaled by what the reference took the first time: so the times
    of two days can be compared although the machine was not equally fast on both.

    Raises:
        TimesError: The file holds something else, or cannot be written.
    """

    def __init__(self, path: Path, subject: str, device: torch.device, stopwatch: Stopwatch) -> None:
        self.path = path
        self.subject = subject
        self.device = device
        self.stopwatch = stopwatch
        self.known: dict[str, float] = self._read() if path.is_file() else {}

    def _read(self) -> dict[str, float]:
        try:
            content = json.loads(self.path.read_text())
            return {str(name): float(value) for name, value in content["seconds"].items()}
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            raise TimesError(
                f"{self.path} does not hold block times; delete it to have them measured again"
            ) from None

    def missing(self, names: Sequence[str]) -> list[str]:
        """What would have to be measured."""
        return [name for name in names if name not in self.known]

    def measure(self, runs: Mapping[str, Run], reference: Run) -> None:
        """Time the runs by turns and remember."""
        first, *seconds = self.stopwatch([reference, *runs.values()], self.device)
        scale = self.known.setdefault("reference", first) / first
        self.known.update({name: value * scale for name, value in zip(runs, seconds, strict=True)})
        content = {"of": self.subject, "seconds": self.known}
        try:
            write_atomically(self.path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise TimesError(
                f"cannot keep block times in {self.path} ({error.strerror}); set XDG_CACHE_HOME to a folder that "
                "can be written, or give --align none"
            ) from None


class _Given(NamedTuple):
    """What the host gave a block."""

    x: Tensor
    extra: dict[str, object]


class Workbench:
    """Blocks of an untouched model, to be timed alone with a method.

    Args:
        host: The model; it is run, and left as it is.
        method: What scores and removes.
        batch_size: Images per forward.
        tell: Told before something is measured.
        stopwatch: Times runs.
    """

    def __init__(
        self,
        host: Host,
        method: Method,
        batch_size: int,
        *,
        tell: Tell = lambda _: None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.host = host
        self.method = method
        self.batch_size = batch_size
        self.tell = tell
        looks = [(type(block.module), block.costs()) for block in host.blocks]
        self.kinds = tuple(looks.index(look) for look in looks)
        """For every block, the first block that is built like it."""
        parameter = next(host.model.parameters())
        subject = self._subject(parameter.device, parameter.dtype)
        name = f"times-{hashlib.sha256(subject.encode()).hexdigest()[:16]}.json"
        watch = least_seconds if stopwatch is None else stopwatch
        self.ledger = Ledger(cache_folder() / name, subject, parameter.device, watch)

    def _subject(self, device: torch.device, dtype: torch.dtype) -> str:
        here = describe_environment(device, dtype, seed=0)
        costs = sorted({str(tuple(block.costs())) for block in self.host.blocks})
        return (
            f"{self.host.name}, {self.host.depth} blocks {' '.join(costs)}, {self.host.num_tokens} tokens, batch "
            f"{self.batch_size}, {here.dtype} on {here.device_name}, {here.threads} threads, torch "
            f"{here.versions['torch']}, version {TIMES_VERSION}"
        )

    def seconds(self, wanted: Sequence[Piece]) -> dict[Piece, float]:
        """Time of every piece; what is not known yet is measured."""
        names = {self._name(piece): piece for piece in wanted}
        if missing := self.ledger.missing(list(names)):
            self.tell(
                f"timing {len(missing)} pieces of {self.host.name} at batch {self.batch_size}, once: kept in "
                f"{self.ledger.path}"
            )
            with _in_eval_mode(self.host), torch.inference_mode():
                runs = {name: self._run(names[name]) for name in missing}
                self.ledger.measure(runs, self._run(Piece("mlp", 0, self.host.num_patches)))
        return {piece: self.ledger.known[name] for name, piece in names.items()}

    def _name(self, piece: Piece) -> str:
        if piece.kind == "model":
            return "model"
        owner = "" if piece.kind == "mlp" else f"{self.method.name} "
        change = "" if piece.keep is None else f" to {piece.keep}"
        return f"block {piece.block}: {owner}{piece.kind} {piece.patches}{change}"

    def _run(self, piece: Piece) -> Run:
        if piece.kind == "model":
            images = random_images(self.host, self.batch_size)
            return lambda: self.host.model(images)
        view = self.host.blocks[piece.block]
        x, state = self._state(piece.block, piece.patches)
        if piece.kind == "mlp":
            return lambda: view.mlp_residual(x)
        keep = piece.patches if piece.keep is None else piece.keep
        scored = self.method.evidence != "none" and piece.kind != "plain"
        step = self._step(keep, score=scored, pruned=piece.patches < self.host.num_patches)
        extra = self._given[piece.block].extra
        return lambda: run_block(
            view, self.method, step, x, state, num_prefix=self.host.num_prefix, extra=extra
        )

    def _step(self, keep: int, *, score: bool, pruned: bool) -> BlockStep:
        return BlockStep(keep, score=score, pruned=pruned, depth=0.5)

    def _state(self, block: int, patches: int) -> tuple[Tensor, TokenState]:
        """Tokens and state as they are when ``patches`` are left, made by the method itself."""
        x, extra = self._given[block]
        state = initial_state(x, self.host.num_prefix, track_carrier=self.method.merges, keep_departed=False)
        for keep in _way_down(self.host.num_patches, patches, halves=self.method.halves):
            pruned = state.positions.shape[1] < self.host.num_patches
            step = self._step(keep, score=self.method.evidence != "none", pruned=pruned)
            x, state, _ = run_block(
                self.host.blocks[block],
                self.method,
                step,
                x,
                state,
                num_prefix=self.host.num_prefix,
                extra=extra,
            )
        return x, state

    @cached_property
    def _given(self) -> dict[int, _Given]:
        """What reaches one block of every kind in a forward of the untouched model."""
        given: dict[int, _Given] = {}

        def note(number: int) -> Callable[[Any, Any, Any], None]:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                extra = {**dict(zip(self.host.positional, args[1:], strict=False)), **kwargs}
                given[number] = _Given(args[0], extra)

            return hook

        hooks = [
            self.host.blocks[number].module.register_forward_pre_hook(note(number), with_kwargs=True)
            for number in sorted(set(self.kinds))
        ]
        try:
            self.host.model(random_images(self.host, self.batch_size))
        finally:
            for hook in hooks:
                hook.remove()
        return given


class Piece(NamedTuple):
    """Something to time: a block with a method, its MLP alone, or the whole dense model."""

    kind: Literal["plain", "score", "remove", "mlp", "model"]
    block: int = 0
    patches: int = 0
    """That enter."""
    keep: int | None = None
    """That leave, where some are removed."""


@contextmanager
def _in_eval_mode(host: Host) -> Any:
    was_training = host.model.training
    host.model.eval()
    try:
        yield
    finally:
        host.model.train(was_training)


def _way_down(num_patches: int, patches: int, *, halves: bool) -> list[int]:
    """Counts to go through, from all patches to ``patches``."""
    counts: list[int] = []
    left = num_patches
    while left > patches:
        left = halved_at_most([patches], left)[0] if halves else patches
        counts.append(left)
    return counts


def predict_seconds(bench: Workbench, schedules: Sequence[Counts]) -> list[float]:
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

    def price(counts: Counts, sample: Sequence[int]) -> float:
        points = (*((count, seconds[plain[count]]) for count in sample), (total, seconds[full]))
        before = (total, *counts[:-1])
        spent = sum(
            (_between(points, old) + _between(points, new)) / 2
            for old, new in zip(before, counts, strict=True)
        )
        return spent + extra * sum(new < old for old, new in zip(before, counts, strict=True))

    return [price(*pair) for pair in zip(schedules, samples, strict=True)]


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
    """Seconds of one batch as a function of how many patches leave each block; see :class:`cpvit.macs.Costs`."""

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


def time_model(bench: Workbench, *, multiple: int = 1) -> TimeModel:
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
