"""``cpvit benchmark``: speed of the dense and the pruned model, in turn in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn

from cpvit.benchmark import Comparison, benchmark, compare
from cpvit.calibrate import Calibration
from cpvit.commands.common import (
    build_calibration,
    build_model,
    build_preprocessing,
    open_source,
    planned,
    progress_bar,
    say,
    set_seed,
    whole_numbers,
    words,
    write_record,
)
from cpvit.commands.options import (
    CalibrationOptions,
    DataOptions,
    EndToEndOptions,
    ModelOptions,
    PreprocessingOptions,
)
from cpvit.commands.tables import benchmark_text, comparison_text, gains_text
from cpvit.data import Batches, make_loader
from cpvit.environment import choose_dtype
from cpvit.plan import Plan, PruneConfig

FOR_SPEED = PruneConfig(align="auto")
"""What is made for the clock is made for this machine's clock."""


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
    pruning: PruneConfig = FOR_SPEED,
    batch_size: int = 32,
    methods: str = "",
    batch_sizes: str = "",
    dtypes: str = "",
    image_sizes: str = "",
    seconds: float = 15.0,
    seed: int = 0,
    plan: Path | None = None,
    json: Path | None = None,
) -> None:
    """Time a model dense and pruned, in turn, on random images; random weights are fine.

    Lists are run through in every combination, all methods of one setting in turn in the same rounds. A run that
    cannot be made is named at the end, after the others, and the exit status is then 1.

    Args:
        batch_size: Images per forward.
        methods: Several methods instead of --method, separated by commas; with --plan that is one more.
        batch_sizes: Several batch sizes instead of --batch-size, separated by commas.
        dtypes: Several dtypes instead of --dtype, separated by commas.
        image_sizes: Sides of several square images instead of --image-size, separated by commas.
        seconds: How long to measure each setting, warm-up not counted.
        seed: Of the weights (without a checkpoint) and images.
        plan: A plan written by ``cpvit plan``, instead of a method and a dial.
        json: Write the record behind what is printed to this file.
    """
    images.check()
    todo = _Todo(model, calibration, preprocessing, images, seconds, seed)
    if not (methods or batch_sizes or dtypes or image_sizes):
        _alone(todo, planned(pruning, plan, default=FOR_SPEED), batch_size, json)
        return
    configs = _configs(pruning, words(methods), plan)
    settings = list(_settings(model, batch_size, batch_sizes, dtypes, image_sizes))
    _several(todo, configs, settings, json)


@dataclass(frozen=True)
class _Todo:
    """What all settings share."""

    model: ModelOptions
    calibration: CalibrationOptions
    preprocessing: PreprocessingOptions
    images: EndToEndOptions
    seconds: float
    seed: int

    def build(self, options: ModelOptions) -> tuple[nn.Module, Calibration | None]:
        set_seed(self.seed)
        network = build_model(options, weights_needed=False)
        statistics = build_calibration(network, self.calibration, self.preprocessing, seed=self.seed)
        return network, statistics

    def batches(self, network: nn.Module, batch_size: int) -> Batches | None:
        """Real images, if they were asked for."""
        if not self.images.end_to_end or self.images.data is None:
            return None
        options = DataOptions(self.images.data, split=self.images.split, seed=self.seed)
        return make_loader(
            open_source(options).limited(self.images.limit, self.seed),
            build_preprocessing(network, self.preprocessing),
            labels=None,
            batch_size=batch_size,
            num_workers=self.images.workers,
            skip_bad_images=self.images.skip_bad_images,
        )


def _alone(todo: _Todo, config: PruneConfig | Plan, batch_size: int, json: Path | None) -> None:
    network, statistics = todo.build(todo.model)
    with progress_bar() as bar:
        task = bar.add_task("benchmark", total=100)
        result = benchmark(
            network,
            config,
            batch_size=batch_size,
            batches=todo.batches(network, batch_size),
            calibration=statistics,
            seconds=todo.seconds,
            seed=todo.seed,
            progress=lambda share: bar.update(task, completed=round(100 * share)),
            tell=say,
        )
    print(benchmark_text(result))
    write_record(result, json)


class _Setting(NamedTuple):
    options: ModelOptions
    batch_size: int

    def __str__(self) -> str:
        size = "x".join(map(str, self.options.image_size or ()))
        return f"{size}, " * bool(size) + f"batch {self.batch_size}, {self.options.dtype}"


def _configs(
    pruning: PruneConfig, methods: tuple[str, ...], plan: Path | None
) -> dict[str, PruneConfig | Plan]:
    """What to prune, by the name of its row."""
    if not methods:
        config = planned(pruning, plan, default=FOR_SPEED)
        return {config.method if plan is None else f"plan ({config.method})": config}
    if pruning.method != FOR_SPEED.method:
        raise ValueError(
            f"give --method or --methods, not both (got {pruning.method} and {','.join(methods)})"
        )
    configs: dict[str, PruneConfig | Plan] = {
        method: dataclasses.replace(pruning, method=method) for method in methods
    }
    if plan is not None:
        loaded = Plan.load(plan)
        configs[f"plan ({loaded.method})"] = loaded
    return configs


def _settings(
    model: ModelOptions, batch_size: int, batch_sizes: str, dtypes: str, image_sizes: str
) -> Iterator[_Setting]:
    """Every combination; the batch size changes fastest, since it needs no other model."""
    sides = whole_numbers(image_sizes)
    sizes: list[tuple[int, ...] | None] = [(side,) for side in sides] if sides else [model.image_size]
    names = words(dtypes) or (model.dtype,)
    for name in names:
        choose_dtype(name)  # say so at once if there is no such dtype
    for size in sizes:
        for name in names:
            options = dataclasses.replace(model, image_size=size, dtype=name)  # type: ignore[arg-type]
            for batch in whole_numbers(batch_sizes) or (batch_size,):
                yield _Setting(options, batch)


def _several(
    todo: _Todo, configs: dict[str, PruneConfig | Plan], settings: list[_Setting], json: Path | None
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
        print(comparison_text(result), end="\n\n", flush=True)
    print(gains_text(results))
    write_record(BenchmarkRuns(tuple(results), tuple(failed)), json)
    if failed:
        raise ValueError(f"{len(failed)} of {len(configs) * len(settings)} runs failed: {'; '.join(failed)}")


def _one(todo: _Todo, configs: dict[str, PruneConfig | Plan], setting: _Setting) -> Comparison:
    network, statistics = todo.build(setting.options)
    with progress_bar() as bar:
        task = bar.add_task(str(setting), total=100)
        return compare(
            network,
            configs,
            batch_size=setting.batch_size,
            batches=todo.batches(network, setting.batch_size),
            calibration=statistics,
            seconds=todo.seconds,
            seed=todo.seed,
            progress=lambda share: bar.update(task, completed=round(100 * share)),
            tell=say,
        )
