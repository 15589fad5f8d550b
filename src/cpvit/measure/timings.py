"""Results of a benchmark, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Literal, TypeAlias

from cpvit.machine.environment import Environment
from cpvit.plans.plan import Plan

Verdict: TypeAlias = Literal["faster", "gained nothing", "slower"]


@dataclass(frozen=True)
class Latency:
    """Milliseconds per batch."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Timing:
    """One model."""

    images_per_s: float
    """At the median latency."""
    latency_ms: Latency
    peak_memory_mib: float
    """Weights plus the most that activations held at once in a forward."""
    macs: int


@dataclass(frozen=True)
class Speedup:
    """Dense over pruned time, taken in every round."""

    median: float
    p10: float
    p90: float

    @property
    def verdict(self) -> Verdict:
        """ "faster" or "slower" only where nine of ten rounds say so."""
        if self.p10 > 1:
            return "faster"
        return "slower" if self.p90 < 1 else "gained nothing"


@dataclass(frozen=True)
class BenchmarkResult:
    """One run of :func:`benchmark`."""

    model: str
    dense: Timing
    pruned: Timing
    speedup: float
    """Dense over pruned median latency."""
    macs_ratio: float
    efficiency: float
    """speedup * macs_ratio: 1 if the clock follows the count, above 1 if it beats it."""
    batch_size: int
    image_size: tuple[int, int]
    rounds: int
    peak_memory_mib: float
    """Most memory of the whole process so far (host memory; CUDA memory on a GPU)."""
    plan: Plan
    environment: Environment
    speedup_by_round: Speedup
    verdict: Verdict
    end_to_end: bool = False
    """Whether decoding and preprocessing of real images were timed along."""


@dataclass(frozen=True)
class Row:
    """One method in one setting."""

    name: str
    timing: Timing
    speedup: Speedup
    macs_ratio: float
    efficiency: float
    """Median speed-up times MACs ratio."""
    verdict: Verdict
    plan: Plan


@dataclass(frozen=True)
class Unfit:
    """A method that does not fit a setting; nothing was timed."""

    name: str
    error: str


@dataclass(frozen=True)
class Comparison:
    """Several methods in one setting: one model, batch size, image size and dtype. One run of :func:`compare`."""

    model: str
    batch_size: int
    image_size: tuple[int, int]
    rounds: int
    dense: Timing
    rows: tuple[Row, ...]
    unfit: tuple[Unfit, ...]
    peak_memory_mib: float
    """Most memory of the whole process so far (host memory; CUDA memory on a GPU)."""
    environment: Environment
    end_to_end: bool = False
    """Whether decoding and preprocessing of real images were timed along."""


def speedup_by_round(dense: Sequence[float], pruned: Sequence[float]) -> Speedup:
    """Dense over pruned seconds of the same round: median, 10th and 90th percentile."""
    ratios = [slow / fast for slow, fast in zip(dense, pruned, strict=True)]
    tenths = quantiles(ratios, n=10, method="inclusive")
    return Speedup(median(ratios), tenths[0], tenths[-1])


def summarize(seconds: Sequence[float]) -> Latency:
    """Median, 10th and 90th percentile, in milliseconds."""
    tenths = quantiles(seconds, n=10, method="inclusive")
    return Latency(1000 * median(seconds), 1000 * tenths[0], 1000 * tenths[-1])
