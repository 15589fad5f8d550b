"""Where the time of a run goes: images/s of reading, decoding, forward and writing, and which of them limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LOADING, RUNNING = ("reading", "decoding"), ("forward", "writing")
ADVICE = {
    "reading": "a faster disk, or images in shards; more --workers where the disk waits for requests",
    "decoding": "more --workers, where there are processors for them",
    "forward": "a smaller budget (--macs), another dtype, or more devices (torchrun, --engine ray)",
    "writing": "a faster disk for --out, or --dtype-out float16 or int8",
}


@dataclass(frozen=True)
class Stages:
    """Seconds that each stage took, summed over the processes that did it; none of them overlaps with itself."""

    images: int = 0
    bad_images: int = 0
    parts: int = 0
    reading: float = 0.0
    decoding: float = 0.0
    forward: float = 0.0
    writing: float = 0.0
    waiting: float = 0.0
    """For images, while nothing else was done."""

    def __add__(self, other: Stages) -> Stages:
        return Stages(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def total(stages: Sequence[Stages]) -> Stages:
    """The sum."""
    return sum(stages, start=Stages())


@dataclass(frozen=True)
class Throughput:
    """What each stage could do alone, in images/s, with the processes that it has."""

    reading: float
    decoding: float
    forward: float
    writing: float
    bottleneck: str
    """Name of a stage, or "none" if nothing ran."""
    waiting_share: float
    """Of the time, that the model waited for images."""


def throughput(stages: Stages, seconds: float, *, workers: int, processes: int) -> Throughput:
    """From seconds to images/s.

    Args:
        stages: Sums over all processes.
        seconds: From the first image to the last part.
        workers: That load images, in each process; 0 if the process does it itself.
        processes: That run the model.
    """
    lanes = dict.fromkeys(LOADING, max(workers, 1) * processes) | dict.fromkeys(RUNNING, processes)
    rates = {
        name: stages.images * count / max(getattr(stages, name), 1e-9) if stages.images else 0.0
        for name, count in lanes.items()
    }
    waiting = min(stages.waiting / max(seconds * processes, 1e-9), 1.0)
    return Throughput(**rates, bottleneck=_bottleneck(stages, workers), waiting_share=waiting)


def _bottleneck(stages: Stages, workers: int) -> str:
    """The slowest stage of the slower side: loading, which workers share, or forward and writing, one after the other.

    Without workers all of them follow one another, and the longest limits.
    """
    if not stages.images:
        return "none"
    loading = max(LOADING, key=lambda name: getattr(stages, name))
    running = max(RUNNING, key=lambda name: getattr(stages, name))
    if not workers:
        return max((loading, running), key=lambda name: getattr(stages, name))
    slow_loading = (stages.reading + stages.decoding) / workers > stages.forward + stages.writing
    return loading if slow_loading else running
