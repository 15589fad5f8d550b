"""``cpvit benchmark``: speed of the dense and the pruned model, in turn in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from torch import nn

from cpvit.commands.common import (
    build_calibration,
    build_model,
    build_preprocessing,
    open_source,
    planned,
    say,
    set_seed,
    whole_numbers,
    words,
)
from cpvit.commands.options import (
    CalibrationOptions,
    DataOptions,
    EndToEndOptions,
    ModelOptions,
    PreprocessingOptions,
    RecordOptions,
)
from cpvit.commands.records import check_output, keep
from cpvit.commands.tables import benchmark_text, comparison_text, gains_text, runtimes_text
from cpvit.commands.terminal import share_bar, show
from cpvit.data import Batches, make_loader
from cpvit.export.benchmark import compare_runtimes
from cpvit.machine.device import choose_dtype
from cpvit.measure.benchmark import BenchmarkOptions, benchmark, compare
from cpvit.measure.timings import Comparison
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig, ScheduleName
from cpvit.plans.escalation import Escalation, load_plan
from cpvit.plans.plan import Plan

BY_DEFAULT = BenchmarkOptions()
FOR_SPEED = PruneConfig(align="auto")
"""What is made for the clock is made for this machine's clock."""


@dataclass(frozen=True)
class BenchmarkMatrix:
    """What to go through, in every combination."""

    methods: str = ""
    """Several methods instead of --method, separated by commas; with --plan that is one more. A schedule other than the
    method's own follows a colon: ``cpvit:linear-ramp``."""
    batch_sizes: str = ""
    """Several batch sizes instead of --batch-size, separated by commas."""
    dtypes: str = ""
    """Several dtypes instead of --dtype, separated by commas."""
    image_sizes: str = ""
    """Sides of several square images instead of --image-size, separated by commas."""
    plan: Path | None = None
    """A plan written by ``cpvit plan``, instead of a method and a budget."""
    runtimes: str = ""
    """Several of torch, torch-compile, onnxruntime, openvino, separated by commas, on the CPU; --dtypes may then have
    int8 as well."""

    @property
    def several(self) -> bool:
        """Whether any list was given."""
        return bool(self.methods or self.batch_sizes or self.dtypes or self.image_sizes)


@dataclass(frozen=True)
class BenchmarkRuns:
    """Several settings, one after the other."""

    settings: tuple[Comparison, ...]
    failed: tuple[str, ...]
    """Runs that could not be made, and why."""


def run(
    model: ModelOptions,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    images: EndToEndOptions,
    matrix: BenchmarkMatrix,
    output: RecordOptions,
    pruning: PruneConfig = FOR_SPEED,
    options: BenchmarkOptions = BY_DEFAULT,
) -> None:
    """Time a model dense and pruned, in turn, on random images; random weights are fine.

    Lists are run through in every combination, all methods of one setting in turn in the same rounds. A run that
    cannot be made is named at the end, after the others, and the exit status is then 1.
    """
    check_output(output)
    images.check()
    if matrix.runtimes:
        _in_runtimes(model, matrix, pruning, options, output)
        return
    todo = _Todo(model, calibration, preprocessing, images, options)
    if not matrix.several:
        _alone(todo, planned(pruning, matrix.plan, default=FOR_SPEED), output)
        return
    configs = _configs(pruning, words(matrix.methods), matrix.plan)
    _several(todo, configs, list(_settings(model, options, matrix)), output)


@dataclass(frozen=True)
class _Todo:
    """What all settings share."""

    model: ModelOptions
    calibration: CalibrationOptions
    preprocessing: PreprocessingOptions
    images: EndToEndOptions
    timing: BenchmarkOptions

    def build(self, options: ModelOptions) -> tuple[nn.Module, Calibration | None]:
        set_seed(self.timing.seed)
        network = build_model(options, weights_needed=False)
        statistics = build_calibration(network, self.calibration, self.preprocessing, seed=self.timing.seed)
        return network, statistics

    def batches(self, network: nn.Module, batch_size: int) -> Batches | None:
        """Real images, if they were asked for."""
        if not self.images.end_to_end or self.images.data is None:
            return None
        options = DataOptions(self.images.data, split=self.images.split, seed=self.timing.seed)
        return make_loader(
            open_source(options).limited(self.images.limit, self.timing.seed),
            build_preprocessing(network, self.preprocessing),
            labels=None,
            batch_size=batch_size,
            num_workers=self.images.workers,
            skip_bad_images=self.images.skip_bad_images,
        )


def _alone(todo: _Todo, config: PruneConfig | Plan | Escalation, output: RecordOptions) -> None:
    network, statistics = todo.build(todo.model)
    with share_bar("benchmark") as progress:
        result = benchmark(
            network,
            config,
            todo.timing,
            batches=todo.batches(network, todo.timing.batch_size),
            calibration=statistics,
            progress=progress,
            on_message=say,
        )
    show(benchmark_text(result))
    keep(result, output)


def _in_runtimes(
    model: ModelOptions,
    matrix: BenchmarkMatrix,
    pruning: PruneConfig,
    timing: BenchmarkOptions,
    output: RecordOptions,
) -> None:
    if matrix.image_sizes or matrix.batch_sizes:
        raise ValueError("--runtimes takes one --batch-size and one --image-size")
    configs = {
        name: _for_runtimes(config)
        for name, config in _configs(pruning, words(matrix.methods), matrix.plan).items()
    }
    set_seed(timing.seed)
    network = build_model(dataclasses.replace(model, device="cpu", dtype="float32"), weights_needed=False)
    with share_bar("benchmark") as progress:
        result = compare_runtimes(
            network,
            configs,
            words(matrix.runtimes),  # type: ignore[arg-type]
            words(matrix.dtypes) or ("float32",),
            batch_size=timing.batch_size,
            seconds=timing.seconds,
            on_message=say,
            progress=progress,
        )
    show(runtimes_text(result))
    keep(result, output)


def _for_runtimes(config: PruneConfig | Plan | Escalation) -> PruneConfig | Plan:
    """What torch likes to have aligned is not what the others like: nothing is, unless it was asked for."""
    if isinstance(config, Escalation):
        raise ValueError("two stages cannot be exported; give a plan, or leave out --runtimes")
    if isinstance(config, PruneConfig) and config.align == "auto":
        return dataclasses.replace(config, align="none")
    return config


class _Setting(NamedTuple):
    options: ModelOptions
    batch_size: int

    def __str__(self) -> str:
        size = "x".join(map(str, self.options.image_size or ()))
        return f"{size}, " * bool(size) + f"batch {self.batch_size}, {self.options.dtype}"


def _configs(
    pruning: PruneConfig, methods: tuple[str, ...], plan: Path | None
) -> dict[str, PruneConfig | Plan | Escalation]:
    """What to prune, by the name of its row."""
    if not methods:
        config = planned(pruning, plan, default=FOR_SPEED)
        method = config.light.method if isinstance(config, Escalation) else config.method
        return {method if plan is None else f"plan ({method})": config}
    if pruning.method != FOR_SPEED.method:
        raise ValueError(
            f"give --method or --methods, not both (got {pruning.method} and {','.join(methods)})"
        )
    configs: dict[str, PruneConfig | Plan | Escalation] = {
        method: _with_method(pruning, method) for method in methods
    }
    if plan is not None:
        loaded = load_plan(plan)
        method = loaded.light.method if isinstance(loaded, Escalation) else loaded.method
        configs[f"plan ({method})"] = loaded
    return configs


def _with_method(pruning: PruneConfig, asked: str) -> PruneConfig:
    """What ``tome`` or ``tome:curve`` (method and schedule) asks for."""
    method, _, schedule = asked.partition(":")
    return dataclasses.replace(
        pruning, method=method, schedule=cast(ScheduleName, schedule or pruning.schedule)
    )


def _settings(model: ModelOptions, timing: BenchmarkOptions, matrix: BenchmarkMatrix) -> Iterator[_Setting]:
    """Every combination; the batch size changes fastest, since it needs no other model."""
    sides = whole_numbers(matrix.image_sizes)
    sizes: list[tuple[int, ...] | None] = [(side,) for side in sides] if sides else [model.image_size]
    names = words(matrix.dtypes) or (model.dtype,)
    for name in names:
        choose_dtype(name)  # say so at once if there is no such dtype
    for size in sizes:
        for name in names:
            options = dataclasses.replace(model, image_size=size, dtype=name)  # type: ignore[arg-type]
            for batch in whole_numbers(matrix.batch_sizes) or (timing.batch_size,):
                yield _Setting(options, batch)


def _several(
    todo: _Todo,
    configs: dict[str, PruneConfig | Plan | Escalation],
    settings: list[_Setting],
    output: RecordOptions,
) -> None:
    results: list[Comparison] = []
    failed: list[str] = []
    for setting in settings:
        try:
            result = _one(todo, configs, setting)
        except (ValueError, TypeError, RuntimeError) as error:
            failed += [f"{name} at {setting}: {error}" for name in configs]
            continue
        results.append(result)
        failed += [f"{unfit.name} at {setting}: {unfit.error}" for unfit in result.unfit]
        show(comparison_text(result) + "\n")
    show(gains_text(results))
    keep(BenchmarkRuns(tuple(results), tuple(failed)), output)
    if failed:
        raise ValueError(f"{len(failed)} of {len(configs) * len(settings)} runs failed: {'; '.join(failed)}")


def _one(todo: _Todo, configs: dict[str, PruneConfig | Plan | Escalation], setting: _Setting) -> Comparison:
    network, statistics = todo.build(setting.options)
    with share_bar(str(setting)) as progress:
        return compare(
            network,
            configs,
            dataclasses.replace(todo.timing, batch_size=setting.batch_size),
            batches=todo.batches(network, setting.batch_size),
            calibration=statistics,
            progress=progress,
            on_message=say,
        )
