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
from cpvit.commands.tables import eval_text, saved_eval_text
from cpvit.measure.evaluate import evaluate, evaluate_pruned
from cpvit.plans.config import PruneConfig
from cpvit.pruning.prune import plan_of


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

    A folder that save_pruned wrote is evaluated as it is: of heads that were cut the dense weights are not in it.

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
        if plan_of(network) is not None:
            if plan is not None or pruning != PruneConfig():
                raise ValueError(
                    f"{model.model} holds a pruned model and its plan; leave out --plan, --method, --macs and the like"
                )
            alone = evaluate_pruned(network, batches, seed=data.seed, progress=progress, processes=processes)
            print(saved_eval_text(alone))
            write_record(alone, json, processes)
            return
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
