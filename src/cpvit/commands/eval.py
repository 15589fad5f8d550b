"""``cpvit eval``: accuracy of the dense and the pruned model, in one run."""

from __future__ import annotations

from pathlib import Path

from cpvit.commands.common import (
    build_batches,
    build_calibration,
    build_model,
    heads_need_images,
    joined,
    planned,
    progress,
    set_seed,
    write_record,
)
from cpvit.commands.options import CalibrationOptions, DataOptions, ModelOptions, PreprocessingOptions
from cpvit.commands.tables import eval_text
from cpvit.measure.evaluate import evaluate
from cpvit.plans.config import PruneConfig


def run(
    model: ModelOptions,
    data: DataOptions,
    pruning: PruneConfig,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    plan: Path | None = None,
    json: Path | None = None,
) -> None:
    """Evaluate a model dense and pruned on the same labelled images.

    Started by torchrun, each process evaluates a share of the images.

    Args:
        plan: A plan written by ``cpvit plan``, instead of a method and a budget.
        json: Write the record behind what is printed to this file.
    """
    set_seed(data.seed)
    with joined(model) as processes:
        network = build_model(model, data=data.data)
        batches = build_batches(network, data, preprocessing, processes)
        config = planned(pruning, plan)
        statistics = build_calibration(
            network,
            calibration,
            preprocessing,
            seed=data.seed,
            fallback=data if heads_need_images(config) else None,
        )
        result = evaluate(
            network,
            batches,
            config,
            calibration=statistics,
            seed=data.seed,
            progress=progress,
            processes=processes,
        )
        print(eval_text(result))
        write_record(result, json, processes)
