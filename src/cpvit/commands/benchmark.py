"""``cpvit benchmark``: speed of the dense and the pruned model, in turn in one process."""

from __future__ import annotations

from pathlib import Path

from cpvit.benchmark import benchmark
from cpvit.commands.common import (
    build_calibration,
    build_model,
    planned,
    progress_bar,
    set_seed,
    write_record,
)
from cpvit.commands.options import CalibrationOptions, ModelOptions, PreprocessingOptions
from cpvit.commands.tables import benchmark_text
from cpvit.plan import PruneConfig


def run(
    model: ModelOptions,
    pruning: PruneConfig,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    batch_size: int = 32,
    seconds: float = 15.0,
    seed: int = 0,
    plan: Path | None = None,
    json: Path | None = None,
) -> None:
    """Time a model dense and pruned, in turn, on random images; random weights are fine.

    Args:
        batch_size: Images per forward.
        seconds: How long to measure, warm-up not counted.
        seed: Of the weights (without a checkpoint) and images.
        plan: A plan written by ``cpvit plan``, instead of a method and a dial.
        json: Write the record behind what is printed to this file.
    """
    set_seed(seed)
    network = build_model(model, weights_needed=False)
    statistics = build_calibration(network, calibration, preprocessing, seed=seed)
    with progress_bar() as bar:
        task = bar.add_task("benchmark", total=100)
        result = benchmark(
            network,
            planned(pruning, plan),
            batch_size=batch_size,
            calibration=statistics,
            seconds=seconds,
            seed=seed,
            progress=lambda share: bar.update(task, completed=round(100 * share)),
        )
    print(benchmark_text(result))
    write_record(result, json)
