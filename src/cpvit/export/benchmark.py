"""How fast are dense and pruned models in the runtimes that serve them? All take turns in one process.

Each row is compared with the dense model in its own runtime and precision (speed-up, efficiency), and with dense
float32 torch, which says what a user gains in all.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from cpvit.adapters import Host
from cpvit.export.description import SUFFIXES, ExportError, Format
from cpvit.export.exporting import ExportOptions, export
from cpvit.export.requirements import required
from cpvit.export.runtimes import open_exported
from cpvit.machine.block_profiler import random_images
from cpvit.machine.environment import Environment, describe_environment
from cpvit.machine.timer import Run, interleave
from cpvit.measure.timings import Latency, Speedup, Unfit, speedup_by_round, summarize
from cpvit.plans.config import PruneConfig
from cpvit.plans.macs import host_macs
from cpvit.plans.plan import Plan
from cpvit.pruning.opening import open_restored
from cpvit.pruning.prune import prune_host

Runtime: TypeAlias = Literal["torch", "torch-compile", "onnxruntime", "openvino"]
RUNTIMES: Mapping[Runtime, Format | None] = {
    "torch": None,
    "torch-compile": None,
    "onnxruntime": "onnx",
    "openvino": "openvino",
}
DTYPES = ("float32", "bfloat16", "int8")
CALIBRATION = 8
"""Images of noise that int8 is calibrated on: the speed does not depend on them."""


@dataclass(frozen=True)
class RuntimeRow:
    """One model in one runtime and precision."""

    name: str
    """ "dense" or the method."""
    runtime: Runtime
    dtype: str
    images_per_s: float
    latency_ms: Latency
    macs_ratio: float
    speedup: Speedup
    """Over the dense model in the same runtime and precision."""
    efficiency: float
    """Median speed-up times MACs ratio."""
    in_all: float
    """Median speed-up over dense float32 torch."""
    plan: Plan | None


@dataclass(frozen=True)
class RuntimeComparison:
    """One run of :func:`compare_runtimes`."""

    model: str
    batch_size: int
    image_size: tuple[int, int]
    rounds: int
    rows: tuple[RuntimeRow, ...]
    unfit: tuple[Unfit, ...]
    """What could not be run, and why."""
    environment: Environment


class _Contender(NamedTuple):
    name: str
    runtime: Runtime
    dtype: str
    run: Run
    macs_ratio: float
    plan: Plan | None


def compare_runtimes(
    model: nn.Module,
    configs: Mapping[str, PruneConfig | Plan],
    runtimes: Sequence[Runtime],
    dtypes: Sequence[str] = ("float32",),
    *,
    batch_size: int = 8,
    seconds: float = 30.0,
    on_message: Callable[[str], None] = lambda _: None,
    progress: Callable[[float], None] = lambda _: None,
) -> RuntimeComparison:
    """Time a model dense and pruned in several runtimes on the CPU, all in turn. The model is left untouched.

    What cannot be run is reported with its reason, and the others are timed. Dense float32 torch always takes part.

    Args:
        model: An untouched model in float32 on the CPU; random weights will do.
        configs: What to prune, by the name its row gets.
        runtimes: Of :data:`RUNTIMES`.
        dtypes: float32, bfloat16, int8.
        batch_size: Images per forward.
        seconds: How long to measure, warm-up not counted.
        on_message: Called with what is made next.
        progress: Called with the share done, 0 to 1.

    Raises:
        ValueError: An unknown runtime or dtype, or a batch size below 1.
    """
    _check(runtimes, dtypes, batch_size)
    dense = open_restored(model)
    images = random_images(dense, batch_size, 0)
    with dense.in_eval_mode(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        maker = _Maker(dense, images, folder, on_message)
        made, unfit = maker.all(
            configs, list(dict.fromkeys([("torch", "float32"), *_pairs(runtimes, dtypes)]))
        )
        times = interleave([one.run for one in made], images.device, seconds, progress)
    reference = {
        (one.runtime, one.dtype): own for one, own in zip(made, times, strict=True) if one.plan is None
    }
    rows = [
        _row(one, own, reference[one.runtime, one.dtype], reference["torch", "float32"], batch_size)
        for one, own in zip(made, times, strict=True)
        if (one.runtime, one.dtype) in reference
    ]
    return RuntimeComparison(
        model=dense.name,
        batch_size=batch_size,
        image_size=(images.shape[2], images.shape[3]),
        rounds=len(times[0]),
        rows=tuple(rows),
        unfit=tuple(unfit),
        environment=describe_environment(images.device, images.dtype, 0),
    )


def _check(runtimes: Sequence[str], dtypes: Sequence[str], batch_size: int) -> None:
    for given, known, what in ((runtimes, RUNTIMES, "runtime"), (dtypes, DTYPES, "dtype")):
        if unknown := set(given) - set(known):
            raise ValueError(f"{what} must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _pairs(runtimes: Sequence[Runtime], dtypes: Sequence[str]) -> Iterator[tuple[Runtime, str]]:
    for dtype in dtypes:
        for runtime in runtimes:
            yield runtime, dtype


@dataclass(frozen=True)
class _Maker:
    """Makes what is timed."""

    dense: Host
    images: Tensor
    folder: Path
    on_message: Callable[[str], None]

    def all(
        self, configs: Mapping[str, PruneConfig | Plan], pairs: Sequence[tuple[Runtime, str]]
    ) -> tuple[list[_Contender], list[Unfit]]:
        whole = host_macs(self.dense)
        hosts: list[tuple[str, Host, Plan | None]] = [("dense", self.dense, None)]
        unfit: list[Unfit] = []
        for name, config in configs.items():
            host = self.dense.copy_sharing_weights()
            try:
                hosts.append((name, host, prune_host(host, config)))
            except (ValueError, TypeError, RuntimeError) as error:
                unfit.append(Unfit(name, " ".join(str(error).split())))
        made: list[_Contender] = []
        for runtime, dtype in pairs:
            for name, host, plan in hosts:
                self.on_message(f"{name} in {runtime}, {dtype}")
                try:
                    run = self._run(f"{name}-{runtime}-{dtype}", host, runtime, dtype)
                except (ValueError, TypeError, RuntimeError) as error:
                    unfit.append(Unfit(f"{name} in {runtime}, {dtype}", " ".join(str(error).split())[:300]))
                    continue
                made.append(_Contender(name, runtime, dtype, run, host_macs(host) / whole, plan))
        return made, unfit

    def _run(self, name: str, host: Host, runtime: Runtime, dtype: str) -> Run:
        to = RUNTIMES[runtime]
        if to is None:
            return self._torch(host, dtype, compiled=runtime == "torch-compile")
        if dtype == "bfloat16":
            _check_bfloat16(to)
        path = self.folder / f"{name.replace(' ', '-')}{SUFFIXES[to]}"
        samples = self.images[:1].repeat(CALIBRATION, 1, 1, 1)
        samples = samples + torch.randn(samples.shape, generator=torch.Generator().manual_seed(1))
        options = ExportOptions(to=to, int8=dtype == "int8")
        made = export(host.model, path, options, images=samples, most_kl=float("inf"))
        exported = open_exported(made.path, bfloat16=dtype == "bfloat16")
        given = exported.as_input(self.images)
        return lambda: exported.run(given)

    def _torch(self, host: Host, dtype: str, *, compiled: bool) -> Run:
        if dtype == "int8":
            raise ExportError("int8 is for onnxruntime and openvino")
        images, model = self.images, host.model
        if dtype == "bfloat16":
            moved = copy.deepcopy(host)
            model, images = moved.model.to(torch.bfloat16), images.to(torch.bfloat16)
        run = torch.compile(model, fullgraph=True) if compiled else model
        if compiled:
            with torch.inference_mode():
                run(images)
        return lambda: run(images)


def _check_bfloat16(to: Format) -> None:
    if to == "onnx":
        raise ExportError("ONNX Runtime has no bfloat16 kernels for the CPU")
    able = required("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in able:
        raise ExportError("this processor has no bfloat16 instructions that OpenVINO uses")


def _row(
    one: _Contender,
    own: Sequence[float],
    dense: Sequence[float],
    torch_dense: Sequence[float],
    batch_size: int,
) -> RuntimeRow:
    speedup = speedup_by_round(dense, own)
    return RuntimeRow(
        name=one.name,
        runtime=one.runtime,
        dtype=one.dtype,
        images_per_s=batch_size / median(own),
        latency_ms=summarize(own),
        macs_ratio=one.macs_ratio,
        speedup=speedup,
        efficiency=speedup.median * one.macs_ratio,
        in_all=speedup_by_round(torch_dense, own).median,
        plan=one.plan,
    )
