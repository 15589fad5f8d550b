"""``cpvit sweep``: several methods at several budgets in one table, one record and one plot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from cpvit.commands.common import (
    build_batches,
    build_calibration,
    build_examples,
    build_model,
    build_preprocessing,
    is_first,
    joined,
    numbers,
    progress,
    progress_bar,
    say,
    set_seed,
    words,
)
from cpvit.commands.options import (
    CalibrationOptions,
    DataOptions,
    ImageRecordOptions,
    ModelOptions,
    PreprocessingOptions,
)
from cpvit.commands.records import check_output, keep
from cpvit.commands.tables import table
from cpvit.commands.terminal import show, timed
from cpvit.data import find_samples, make_loader
from cpvit.measure.sweep import SweepOptions, SweepResult, sweep
from cpvit.pictures.sweeps import plot_sweep
from cpvit.plans.plan import Plan
from cpvit.tuning.target import Target
from cpvit.tuning.tune import TuneOptions, tune


@dataclass(frozen=True)
class ComparisonOptions:
    """What to compare."""

    methods: str = "cpvit,cpvit-merge,tome,pitome,evit,topk,random"
    """Names, separated by commas. A schedule other than the method's own follows a colon: ``tome:curve`` gives ToMe the
    numbers of patches that ``cpvit-merge`` has."""
    macs: str = "0.9,0.8,0.7,0.6,0.5,0.4"
    """Fractions of the dense MACs, separated by commas."""
    searched: str = ""
    """Methods whose schedule is searched for on the calibration images, separated by commas."""
    trials: int = 40
    """Schedules to evaluate in each search."""
    plans: str = ""
    """Files written by ``cpvit plan``, separated by commas: rows and a line of their own."""


T = TypeVar("T")
BY_DEFAULT = ComparisonOptions()


def run(
    model: ModelOptions,
    data: DataOptions,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    output: ImageRecordOptions,
    comparison: ComparisonOptions = BY_DEFAULT,
    plot: Path | None = None,
) -> None:
    """Evaluate several methods at several MACs budgets on the same images.

    Started by torchrun, each process evaluates a share of the images.

    Args:
        plot: Write a picture (PNG or SVG): top-1 and KL against MACs, a line per method.
    """
    check_output(output)
    set_seed(data.seed)
    searched, trials = words(comparison.searched), comparison.trials
    if searched and calibration.calibration is None:
        raise ValueError("--searched needs images that are not evaluated: give --calibration")
    loaded = [Plan.load(path) for path in words(comparison.plans)]
    methods, budgets = words(comparison.methods), numbers(comparison.macs)
    with joined(model) as processes, progress_bar() as bar:
        network = build_model(model, data=data.data)
        batches = build_batches(network, data, preprocessing, processes)
        images = _search_images(network, calibration, preprocessing, data.seed) if searched else None
        examples = build_examples(network, preprocessing, output)
        options = SweepOptions(methods, budgets, tuple(loaded), data.seed, examples)
        passes = 1 + len(methods) * len(budgets) + len(loaded)
        whole = bar.add_task("sweep", total=passes * len(batches))
        task = bar.add_task("search", total=trials, visible=False)

        def search(method: str, budget: float) -> Plan:
            def on_trial(count: int, best: float) -> None:
                title = f"{method} {budget:g} distance {best:.3f}"
                bar.update(task, completed=count, visible=count < trials, description=title)

            target = Target(macs=budget)
            settings = TuneOptions(method=method, trials=trials, seed=data.seed)
            assert images is not None, "read above, since something is searched for"
            return tune(network, images, target, settings, on_trial=on_trial, processes=processes).plan

        def track(items: Iterable[T], title: str, total: int) -> Iterator[T]:
            """A bar for this pass; the one above is for all of them."""
            own = bar.add_task(title, total=total)
            with timed(title):
                for item in bar.track(items, total=total, task_id=own):
                    yield item
                    bar.advance(whole)
            bar.remove_task(own)

        result = sweep(
            network,
            batches,
            options,
            calibration=build_calibration(network, calibration, preprocessing, seed=data.seed),
            search={method: partial(search, method) for method in searched},
            progress=track,
            processes=processes,
        )
        show(_text(result))
        if plot is not None and is_first(processes):
            say(f"plot: {plot_sweep(result, plot)}")
        keep(result, output, processes)


def _search_images(
    network: Any, calibration: CalibrationOptions, preprocessing: PreprocessingOptions, seed: int
) -> Any:
    source = find_samples(calibration.calibration or "").limited(calibration.calibration_limit, seed)
    loader = make_loader(source, build_preprocessing(network, preprocessing), labels=None, batch_size=32)
    return torch.cat([batch.images for batch in progress(loader, "images", len(loader))])


def _text(result: SweepResult) -> str:
    rows = [
        [
            point.method,
            point.schedule,
            f"{point.macs_ratio:.4f}",
            f"{point.top1:.2f}",
            f"{point.top1_lost:.2f}",
            f"{point.agreement:.4f}",
            f"{point.kl:.4f}",
        ]
        for point in result.points
    ]
    head = f"{result.model}, {result.images} images, dense top-1 {result.dense_top1:.2f}, top-5 {result.dense_top5:.2f}"
    columns = ["method", "schedule", "MACs", "top-1 %", "lost", "agreement", "KL"]
    return f"{head}\n{table(columns, rows)}"
