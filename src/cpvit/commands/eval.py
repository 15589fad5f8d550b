"""``cpvit eval``: accuracy of the dense and the pruned model, in one run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cpvit.commands.common import (
    build_batches,
    build_calibration,
    build_examples,
    build_model,
    heads_need_images,
    joined,
    labelled_batches,
    open_model,
    planned,
    progress,
    set_seed,
)
from cpvit.commands.options import (
    CalibrationOptions,
    DataOptions,
    ImageRecordOptions,
    ModelOptions,
    PreprocessingOptions,
)
from cpvit.commands.records import check_output, keep
from cpvit.commands.tables import eval_text, exported_text, saved_eval_text
from cpvit.commands.terminal import show
from cpvit.export.evaluating import evaluate_exported
from cpvit.export.runtimes import open_exported
from cpvit.machine.device import choose_device, choose_dtype
from cpvit.measure.evaluate import evaluate, evaluate_host, evaluate_pruned
from cpvit.multimodal.two_towers import TEMPLATES, open_two_towers, read_lines, zero_shot_classifier
from cpvit.plans.config import PruneConfig
from cpvit.plans.escalation import Escalation
from cpvit.plans.plan import Plan
from cpvit.pruning.prune import plan_of


@dataclass(frozen=True)
class EvalModelOptions(ModelOptions):
    """Which model, with which weights, and where it runs."""

    model: str = ""
    """As for every command; with --exported the dense model to compare with, which may be left out."""
    zero_shot: Path | None = None
    """A text file with a class name per line, in the order of the labels: a model with a text tower (open_clip:..., or
    hf:... of CLIP, SigLIP) classifies by them."""
    templates: Path | None = None
    """For --zero-shot: a text file with a template per line, such as: a photo of a {}."""


def run(
    model: EvalModelOptions,
    data: DataOptions,
    pruning: PruneConfig,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    output: ImageRecordOptions,
    plan: Path | None = None,
    exported: Path | None = None,
) -> None:
    """Evaluate a model dense and pruned on the same labelled images.

    A folder that save_pruned wrote is evaluated as it is: of heads that were cut the dense weights are not in it.

    Started by torchrun, each process evaluates a share of the images.

    Args:
        plan: A plan written by ``cpvit plan``, instead of a method and a budget.
        exported: A file written by ``cpvit export``, instead of pruning anything; it runs in its own runtime.
    """
    check_output(output)
    set_seed(data.seed)
    if exported is not None:
        if model.zero_shot is not None:
            raise ValueError("--exported holds its classes; leave out --zero-shot")
        if plan is not None or pruning != PruneConfig():
            raise ValueError("--exported holds its plan; leave out --plan, --method, --macs and the like")
        _exported(exported, model, data, preprocessing, output)
        return
    if not model.model:
        raise ValueError("give --model NAME, or --exported FILE")
    if model.zero_shot is not None:
        _zero_shot(model, data, planned(pruning, plan), calibration, preprocessing, output)
        return
    if model.templates is not None:
        raise ValueError("--templates is for --zero-shot CLASSES.txt; give both, or neither")
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
            show(saved_eval_text(alone))
            keep(alone, output, processes)
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
            examples=build_examples(network, preprocessing, output),
        )
        show(eval_text(result))
        keep(result, output, processes)


def _exported(
    path: Path,
    model: ModelOptions,
    data: DataOptions,
    preprocessing: PreprocessingOptions,
    output: ImageRecordOptions,
) -> None:
    opened = open_exported(path)
    described = opened.description
    if described.preprocessing is None or preprocessing != PreprocessingOptions():
        raise ValueError(
            "the exported file says how images are prepared; leave out --mean, --std and the like"
            if described.preprocessing is not None
            else f"{path} does not say how images are prepared; export it anew with --mean and --std"
        )
    with joined(model) as processes:
        batches = labelled_batches(data, described.preprocessing, described.num_outputs, processes)
        dense = open_model(model, data=data.data) if model.model else None
        result = evaluate_exported(
            opened, batches, dense=dense, seed=data.seed, progress=progress, processes=processes
        )
        show(exported_text(result))
        keep(result, output, processes)


def _zero_shot(
    model: EvalModelOptions,
    data: DataOptions,
    config: PruneConfig | Plan | Escalation,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    output: ImageRecordOptions,
) -> None:
    assert model.zero_shot is not None, "run looked"
    with joined(model) as processes:
        towers = open_two_towers(model.model, pretrained=model.pretrained, checkpoint=model.checkpoint)
        classes = read_lines(model.zero_shot)
        templates = TEMPLATES if model.templates is None else read_lines(model.templates)
        host = zero_shot_classifier(towers, classes, templates)
        network = host.model.to(choose_device(model.device), choose_dtype(model.dtype))
        batches = build_batches(network, data, preprocessing, processes, len(classes))
        statistics = build_calibration(
            network,
            calibration,
            preprocessing,
            seed=data.seed,
            fallback=data if heads_need_images(config) else None,
        )
        result = evaluate_host(
            host,
            batches,
            config,
            calibration=statistics,
            seed=data.seed,
            progress=progress,
            processes=processes,
            examples=replace(build_examples(network, preprocessing, output), classes=tuple(classes)),
        )
        show(f"zero-shot, {len(classes)} classes in {len(templates)} templates, of the image tower:")
        show(eval_text(result))
        keep(result, output, processes)
