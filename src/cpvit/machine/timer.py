"""Time several functions in turn on one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from cpvit.machine.device import synchronize

Run: TypeAlias = Callable[[], object]
Timer: TypeAlias = Callable[[Sequence[Run], torch.device], list[float]]
"""Seconds of each run."""
OnMessage: TypeAlias = Callable[[str], None]
"""Called with a sentence about what is done next."""

MIN_ROUNDS = 7
BLOCK_ROUNDS = 6
ACCELERATOR_REPEATS = 8
"""Calls timed at once on a GPU, which runs behind its host: alone each would also show the wait for it."""


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
    repeats = 1 if device.type == "cpu" else ACCELERATOR_REPEATS
    rounds = [[_timed(run, device, repeats) for run in runs] for _ in range(BLOCK_ROUNDS + 1)]
    return [min(times) / repeats for times in zip(*rounds[1:], strict=True)]


def _timed(run: Run, device: torch.device, repeats: int = 1) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return time.perf_counter() - start
