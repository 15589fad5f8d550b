"""How fast is the pruned model? Dense and pruned take turns in one process, on the same input.

Machines drift; a ratio of neighbours in time does not. So every round times the dense model and all pruned ones once,
the speed-up is taken round by round, and what is reported is its median with the 10th and 90th percentile: where they
do not lie above 1, nothing was gained. The dense model is the host's own, with its fused attention: the right baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from torch import nn

from cpvit.adapters import Host
from cpvit.data import Batches
from cpvit.kernels.cuda_graphs import CapturedModel, check_devices
from cpvit.machine.align import resolve_align
from cpvit.machine.block_profiler import random_images
from cpvit.machine.environment import describe_environment
from cpvit.machine.timer import OnMessage, Run, interleave
from cpvit.measure.memory import peak_memory_mib, process_peak_mib
from cpvit.measure.timings import BenchmarkResult, Comparison, Row, Timing, Unfit, speedup_by_round, summarize
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig
from cpvit.plans.escalation import Escalation
from cpvit.plans.macs import host_macs
from cpvit.plans.plan import Plan
from cpvit.pruning.escalation import EscalatingModel, ForcedShare, escalate_host, mean_macs
from cpvit.pruning.opening import open_restored
from cpvit.pruning.prune import prune_host


@dataclass(frozen=True)
class BenchmarkOptions:
    """How to measure."""

    batch_size: int = 32
    """Images per forward."""
    seconds: float = 15.0
    """How long to measure, warm-up not counted; at least seven rounds are run."""
    seed: int = 0
    """Of the random images."""
    cuda_graphs: bool = False
    """Record every forward once and replay it (:class:`cpvit.kernels.cuda_graphs.CapturedModel`)."""


def benchmark(
    model: nn.Module,
    config: PruneConfig | Plan | Escalation | None = None,
    options: BenchmarkOptions | None = None,
    *,
    batches: Batches | None = None,
    calibration: Calibration | None = None,
    progress: Callable[[float], None] = lambda _: None,
    on_message: OnMessage = lambda _: None,
) -> BenchmarkResult:
    """Time a model dense and pruned, in turn. The model is left untouched.

    Args:
        model: An untouched model on its device and in its dtype; random weights will do.
        config: What to prune; ``align="auto"`` is measured for this batch size.
        options: Batch size, time to spend, seed.
        batches: Real images, in batches of that size, to time everything from their files to the output: decoding,
            preprocessing and forward. By default the forward alone, on random images that lie on the device.
        calibration: For a layer-aware schedule or cut heads.
        progress: Called with the share done, 0 to 1.
        on_message: Called when something has to be measured first.

    Raises:
        ValueError: The configuration does not fit the model, or a batch size below 1.
    """
    stage = _Stage(model, BenchmarkOptions() if options is None else options, batches)
    with stage.dense.in_eval_mode():
        made = stage.prune("pruned", PruneConfig() if config is None else config, calibration, on_message)
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
    configs: Mapping[str, PruneConfig | Plan | Escalation],
    options: BenchmarkOptions | None = None,
    *,
    batches: Batches | None = None,
    calibration: Calibration | None = None,
    progress: Callable[[float], None] = lambda _: None,
    on_message: OnMessage = lambda _: None,
) -> Comparison:
    """Time a model dense and pruned in several ways, all in turn. The model is left untouched.

    A configuration that does not fit the model is reported with its error, and the others are timed.

    Args:
        configs: What to prune, by the name its row gets; the rest as for :func:`benchmark`.

    Raises:
        ValueError: A batch size below 1.
    """
    stage = _Stage(model, BenchmarkOptions() if options is None else options, batches)
    made: list[_Pruned] = []
    unfit: list[Unfit] = []
    with stage.dense.in_eval_mode():
        for name, config in configs.items():
            try:
                made.append(stage.prune(name, config, calibration, on_message))
            except (ValueError, TypeError, RuntimeError) as error:
                unfit.append(Unfit(name, " ".join(str(error).split())))
        result = stage.time(made, progress)
    return dataclasses.replace(result, unfit=tuple(unfit))


class _Pruned(NamedTuple):
    name: str
    host: Host
    plan: Plan
    macs: int
    """Of one image; the mean where only some images run again."""


class _Stage:
    """One setting: a dense model, its pruned copies, and the same input for all."""

    def __init__(self, model: nn.Module, options: BenchmarkOptions, batches: Batches | None) -> None:
        if options.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {options.batch_size}")
        self.dense = open_restored(model)
        self.options = options
        self.batches = batches
        self.images = random_images(self.dense, options.batch_size, options.seed)
        if options.cuda_graphs:  # before anything is measured
            check_devices(self.dense.model, self.images)

    def prune(
        self,
        name: str,
        config: PruneConfig | Plan | Escalation,
        calibration: Calibration | None,
        on_message: OnMessage,
    ) -> _Pruned:
        """A pruned copy that shares the dense model's weights, but for heads that are cut out of them."""
        if isinstance(config, Escalation):
            return self._escalating(name, config)
        if isinstance(config, PruneConfig):
            config = resolve_align(
                self.dense, config, calibration, batch_size=len(self.images), on_message=on_message
            )
        if isinstance(config, Plan) and calibration is None:
            config = config.uncorrected  # other values in the projections, the same time
        pruned = self.dense.copy_sharing_weights()
        plan = prune_host(pruned, config, calibration=calibration)
        return _Pruned(name, pruned, plan, host_macs(pruned))

    def _escalating(self, name: str, config: Escalation) -> _Pruned:
        """On noise the share that ran again on the calibration images is forced: a model is never sure of noise."""
        kind = ForcedShare if self.batches is None else EscalatingModel
        model = escalate_host(self.dense, config, kind=kind)
        macs = round(mean_macs(self.dense, config, config.share) * host_macs(self.dense))
        return _Pruned(name, model.host, config.light, macs)

    def time(self, pruned: Sequence[_Pruned], progress: Callable[[float], None]) -> Comparison:
        """The dense model and all of these in turn."""
        hosts = [self.dense, *(entry.host for entry in pruned)]
        times = interleave(
            [self._run(host.model) for host in hosts], self.images.device, self.options.seconds, progress
        )
        dense = self._timing(self.dense, host_macs(self.dense), times[0])
        rows = tuple(
            self._row(entry, dense, times[0], own) for entry, own in zip(pruned, times[1:], strict=True)
        )
        return Comparison(
            model=self.dense.name,
            batch_size=len(self.images),
            image_size=(self.images.shape[2], self.images.shape[3]),
            rounds=len(times[0]),
            dense=dense,
            rows=rows,
            unfit=(),
            peak_memory_mib=process_peak_mib(self.images.device),
            environment=describe_environment(self.images.device, self.images.dtype, self.options.seed),
            end_to_end=self.batches is not None,
        )

    def _run(self, model: nn.Module) -> Run:
        run = CapturedModel(model, self.images) if self.options.cuda_graphs else model
        if self.batches is None:
            return lambda: run(self.images)
        return lambda: [
            run(batch.images.to(self.images.device, self.images.dtype)) for batch in self.batches or ()
        ]

    def _row(
        self, entry: _Pruned, dense: Timing, dense_seconds: Sequence[float], seconds: Sequence[float]
    ) -> Row:
        timing = self._timing(entry.host, entry.macs, seconds)
        speedup = speedup_by_round(dense_seconds, seconds)
        ratio = timing.macs / dense.macs
        return Row(
            entry.name, timing, speedup, ratio, speedup.median * ratio, speedup.verdict, plan=entry.plan
        )

    def _timing(self, host: Host, macs: int, seconds: Sequence[float]) -> Timing:
        """A run over real images is several batches; the latency is that of one."""
        batches = 1 if self.batches is None else len(self.batches)
        images = (
            len(self.images) if self.batches is None else self.batches.num_images - len(self.batches.skipped)
        )
        return Timing(
            images_per_s=images / median(seconds),
            latency_ms=summarize([spent / batches for spent in seconds]),
            peak_memory_mib=peak_memory_mib(host.model, self.images),
            macs=macs,
        )
