"""How fast is the pruned model? Dense and pruned take turns in one process, on the same input.

Machines drift; a ratio of neighbours in time does not. So every round times the dense model and all pruned ones once,
the speed-up is taken round by round, and what is reported is its median with the 10th and 90th percentile: where they
do not lie above 1, nothing was gained. The dense model is the host's own, with its fused attention: the right baseline.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from statistics import median, quantiles
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from cpvit.adapters import open_host
from cpvit.calibrate import Calibration
from cpvit.data import Batches
from cpvit.environment import Environment, describe_environment
from cpvit.macs import count_macs
from cpvit.plan import Plan, PruneConfig
from cpvit.planning import best_align
from cpvit.prune import prune_, unprune_
from cpvit.timing import Run, Tell, interleave, random_images

MIB = 1 << 20

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


def benchmark(
    model: nn.Module,
    config: PruneConfig | Plan | None = None,
    *,
    batch_size: int = 32,
    batches: Batches | None = None,
    calibration: Calibration | None = None,
    seconds: float = 15.0,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
    tell: Tell = lambda _: None,
) -> BenchmarkResult:
    """Time a model dense and pruned, in turn. The model is left untouched.

    Args:
        model: An untouched model on its device and in its dtype; random weights will do.
        config: What to prune; ``align="auto"`` is measured for this batch size.
        batch_size: Images per forward.
        batches: Real images, in batches of that size, to time everything from their files to the output: decoding,
            preprocessing and forward. By default the forward alone, on random images that lie on the device.
        calibration: For a layer-aware schedule or cut heads.
        seconds: How long to measure, warm-up not counted; at least seven rounds are run.
        seed: Of the random images.
        progress: Called with the share done, 0 to 1.
        tell: Told when something has to be measured first.

    Raises:
        ValueError: The configuration does not fit the model, or a batch size below 1.
    """
    stage = _Stage(model, batch_size, batches, seconds, seed)
    with stage.set_up():
        made = stage.prune("pruned", PruneConfig() if config is None else config, calibration, tell)
        result = stage.time([made], progress)
    plan, row = made.plan, result.rows[0]
    speedup = result.dense.latency_ms.median / row.timing.latency_ms.median
    return BenchmarkResult(
        model=plan.model,
        dense=result.dense,
        pruned=row.timing,
        speedup=speedup,
        macs_ratio=row.macs_ratio,
        efficiency=speedup * row.macs_ratio,
        batch_size=result.batch_size,
        image_size=result.image_size,
        rounds=result.rounds,
        peak_memory_mib=result.peak_memory_mib,
        plan=plan,
        environment=result.environment,
        speedup_by_round=row.speedup,
        verdict=row.verdict,
        end_to_end=result.end_to_end,
    )


def compare(
    model: nn.Module,
    configs: Mapping[str, PruneConfig | Plan],
    *,
    batch_size: int = 32,
    batches: Batches | None = None,
    calibration: Calibration | None = None,
    seconds: float = 15.0,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
    tell: Tell = lambda _: None,
) -> Comparison:
    """Time a model dense and pruned in several ways, all in turn. The model is left untouched.

    A configuration that does not fit the model is reported with its error, and the others are timed.

    Args:
        configs: What to prune, by the name its row gets; the rest as for :func:`benchmark`.

    Raises:
        ValueError: A batch size below 1.
    """
    stage = _Stage(model, batch_size, batches, seconds, seed)
    made: list[_Pruned] = []
    unfit: list[Unfit] = []
    with stage.set_up():
        for name, config in configs.items():
            try:
                made.append(stage.prune(name, config, calibration, tell))
            except (ValueError, TypeError, RuntimeError) as error:
                unfit.append(Unfit(name, " ".join(str(error).split())))
        result = stage.time(made, progress)
    return dataclasses.replace(result, unfit=tuple(unfit))


class _Pruned(NamedTuple):
    name: str
    model: nn.Module
    plan: Plan


class _Stage:
    """One setting: a dense model, its pruned copies, and the same input for all."""

    def __init__(
        self, model: nn.Module, batch_size: int, batches: Batches | None, seconds: float, seed: int
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model
        self.batches = batches
        self.seconds = seconds
        self.seed = seed
        self.images = random_images(open_host(model), batch_size, seed)

    @contextmanager
    def set_up(self) -> Iterator[None]:
        """The model is dense and in eval mode meanwhile."""
        unprune_(self.model)
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def prune(
        self, name: str, config: PruneConfig | Plan, calibration: Calibration | None, tell: Tell
    ) -> _Pruned:
        """A pruned copy that shares the dense model's weights, but for heads that are cut out of them."""
        if isinstance(config, PruneConfig) and config.align == "auto":
            host = open_host(self.model)
            align = best_align(host, config, calibration, batch_size=len(self.images), tell=tell)
            config = dataclasses.replace(config, align=align)
        if isinstance(config, Plan) and calibration is None:
            config = config.uncorrected  # other values in the projections, the same time
        shared = {id(tensor): tensor for tensor in chain(self.model.parameters(), self.model.buffers())}
        pruned = copy.deepcopy(self.model, shared)
        return _Pruned(name, pruned, prune_(pruned, config, calibration=calibration))

    def time(self, pruned: Sequence[_Pruned], progress: Callable[[float], None]) -> Comparison:
        """The dense model and all of these in turn."""
        models = [self.model, *(entry.model for entry in pruned)]
        times = interleave([self._run(model) for model in models], self.images.device, self.seconds, progress)
        dense = self._timing(self.model, times[0])
        rows = tuple(
            self._row(entry, dense, times[0], own) for entry, own in zip(pruned, times[1:], strict=True)
        )
        return Comparison(
            model=open_host(self.model).name,
            batch_size=len(self.images),
            image_size=(self.images.shape[2], self.images.shape[3]),
            rounds=len(times[0]),
            dense=dense,
            rows=rows,
            unfit=(),
            peak_memory_mib=process_peak_mib(self.images.device),
            environment=describe_environment(self.images.device, self.images.dtype, self.seed),
            end_to_end=self.batches is not None,
        )

    def _run(self, model: nn.Module) -> Run:
        if self.batches is None:
            return lambda: model(self.images)
        return lambda: [
            model(batch.images.to(self.images.device, self.images.dtype)) for batch in self.batches or ()
        ]

    def _row(
        self, entry: _Pruned, dense: Timing, dense_seconds: Sequence[float], seconds: Sequence[float]
    ) -> Row:
        timing = self._timing(entry.model, seconds)
        speedup = speedup_by_round(dense_seconds, seconds)
        ratio = timing.macs / dense.macs
        return Row(
            entry.name, timing, speedup, ratio, speedup.median * ratio, speedup.verdict, plan=entry.plan
        )

    def _timing(self, model: nn.Module, seconds: Sequence[float]) -> Timing:
        """A run over real images is several batches; the latency is that of one."""
        batches = 1 if self.batches is None else len(self.batches)
        images = (
            len(self.images) if self.batches is None else self.batches.num_images - len(self.batches.skipped)
        )
        return Timing(
            images_per_s=images / median(seconds),
            latency_ms=summarize([spent / batches for spent in seconds]),
            peak_memory_mib=peak_memory_mib(model, self.images),
            macs=count_macs(model),
        )


def speedup_by_round(dense: Sequence[float], pruned: Sequence[float]) -> Speedup:
    """Dense over pruned seconds of the same round: median, 10th and 90th percentile."""
    ratios = [slow / fast for slow, fast in zip(dense, pruned, strict=True)]
    tenths = quantiles(ratios, n=10, method="inclusive")
    return Speedup(median(ratios), tenths[0], tenths[-1])


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
