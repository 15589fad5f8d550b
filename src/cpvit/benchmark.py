"""How fast is the pruned model? Dense and pruned take turns in one process, on the same input.

Machines drift; a ratio of neighbours in time does not. The dense model is the host's own, with its fused
attention: the right baseline.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from cpvit.adapters import open_host
from cpvit.calibrate import Calibration
from cpvit.environment import Environment, describe_environment
from cpvit.macs import count_macs
from cpvit.plan import Plan, PruneConfig
from cpvit.prune import prune_, unprune_

MIB = 1 << 20
MIN_ROUNDS = 7


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


def benchmark(
    model: nn.Module,
    config: PruneConfig | Plan | None = None,
    *,
    batch_size: int = 32,
    calibration: Calibration | None = None,
    seconds: float = 15.0,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> BenchmarkResult:
    """Time a model dense and pruned, in turn, on random images. The model is left untouched.

    Args:
        model: An untouched model on its device and in its dtype; random weights will do.
        config: What to prune.
        batch_size: Images per forward.
        calibration: For a layer-aware schedule or cut heads.
        seconds: How long to measure, warm-up not counted; at least seven rounds are run.
        seed: Of the random images.
        progress: Called with the share done, 0 to 1.

    Raises:
        ValueError: The configuration does not fit the model, or a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    unprune_(model)
    was_training = model.training
    model.eval()
    pruned = copy.deepcopy(model)
    plan = prune_(pruned, config, calibration=calibration)
    images = _random_images(model, batch_size, seed)
    times = interleave([lambda: model(images), lambda: pruned(images)], images.device, seconds, progress)
    dense_side, pruned_side = (
        _timing(side, images, spent) for side, spent in zip((model, pruned), times, strict=True)
    )
    speedup = dense_side.latency_ms.median / pruned_side.latency_ms.median
    ratio = pruned_side.macs / dense_side.macs
    model.train(was_training)
    return BenchmarkResult(
        model=plan.model,
        dense=dense_side,
        pruned=pruned_side,
        speedup=speedup,
        macs_ratio=ratio,
        efficiency=speedup * ratio,
        batch_size=batch_size,
        image_size=(images.shape[2], images.shape[3]),
        rounds=len(times[0]),
        peak_memory_mib=process_peak_mib(images.device),
        plan=plan,
        environment=describe_environment(images.device, images.dtype, seed),
    )


def _random_images(model: nn.Module, batch_size: int, seed: int) -> Tensor:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, *open_host(model).image_shape, generator=generator)
    return images.to(parameter.device, parameter.dtype)


@torch.inference_mode()
def interleave(
    runs: Sequence[Callable[[], object]],
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


def _timed(run: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timing(model: nn.Module, images: Tensor, seconds: Sequence[float]) -> Timing:
    latency = summarize(seconds)
    return Timing(
        images_per_s=len(images) * 1000 / latency.median,
        latency_ms=latency,
        peak_memory_mib=peak_memory_mib(model, images),
        macs=count_macs(model),
    )


def summarize(seconds: Sequence[float]) -> Latency:
    """Median, 10th and 90th percentile, in milliseconds."""
    tenths = quantiles(seconds, n=10, method="inclusive")
    return Latency(1000 * median(seconds), 1000 * tenths[0], 1000 * tenths[-1])


@torch.inference_mode()
def peak_memory_mib(model: nn.Module, images: Tensor) -> float:
    """Weights plus the most that tensors held at once during one forward, from the allocator's own account."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        model(images)
        return (weights + torch.cuda.max_memory_allocated(images.device) - before) / MIB
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else it reports on stderr that there is no GPU
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        model(images)
    return (weights + _peak_of(profile)) / MIB


def _peak_of(profile: torch.profiler.profile) -> int:
    held = peak = 0
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def process_peak_mib(device: torch.device) -> float:
    """Most memory this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
