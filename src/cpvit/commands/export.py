"""``cpvit export``: a dense or pruned model as a file for ONNX Runtime, OpenVINO or ``torch.export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cpvit.commands.common import (
    build_model,
    build_preprocessing,
    class_names,
    heads_need_images,
    planned,
    progress,
    say,
    set_seed,
    write_record,
)
from cpvit.commands.options import ModelOptions, PreprocessingOptions
from cpvit.commands.tables import export_text
from cpvit.commands.terminal import show, stage_bar
from cpvit.data import Preprocessing, find_samples, make_loader
from cpvit.export.exporting import STAGES, ExportOptions, export
from cpvit.plans.config import PruneConfig
from cpvit.plans.escalation import Escalation
from cpvit.pruning.calibrate import calibrate
from cpvit.pruning.prune import plan_of, prune_

BY_DEFAULT = ExportOptions()


@dataclass(frozen=True)
class ExportImages:
    """Unlabelled images that int8 is calibrated on, heads are chosen on, and the file is compared with torch on."""

    calibration: str | None = None
    """A folder or a .tar of images, or shards; without them the comparison is on noise."""
    calibration_limit: int = 128
    """How many of them to use (seeded sample)."""
    seed: int = 0
    """Of the sample."""


@dataclass(frozen=True)
class ExportInstead:
    """What to export instead of a model pruned by a method and a budget."""

    plan: Path | None = None
    """A plan written by ``cpvit plan``."""
    dense: bool = False
    """The dense model."""


def run(
    model: ModelOptions,
    out: Path,
    pruning: PruneConfig,
    images: ExportImages,
    preprocessing: PreprocessingOptions,
    options: ExportOptions = BY_DEFAULT,
    instead: ExportInstead = ExportInstead(),
    json: Path | None = None,
) -> None:
    """Write a model to a file for another runtime, run it there, and compare it with torch.

    What does not answer as torch does is not left behind, and the exit status is then 1. OUT.json says what the file
    holds, what it expects and how it compared.

    Args:
        out: The file to write: .onnx, .xml (OpenVINO; the weights go into a .bin beside it) or .pt2.
        json: Write the record behind what is printed to this file.
    """
    plan, dense = instead.plan, instead.dense
    if dense and (plan is not None or pruning != PruneConfig()):
        raise ValueError("--dense prunes nothing; leave out --plan, --method, --macs and the like")
    config = planned(pruning, plan)
    if isinstance(config, Escalation) and not dense:
        raise ValueError(
            "two stages cannot be exported: which images run again depends on their values; export a plan"
        )
    set_seed(images.seed)
    network = build_model(model, weights_needed=False)
    if model.checkpoint is None and not model.pretrained and not Path(model.model).is_dir():
        say("no --checkpoint: the weights are random")
    saved = plan_of(network) is not None
    if saved and (dense or plan is not None or pruning != PruneConfig()):
        raise ValueError(
            f"{model.model} holds a pruned model and its plan; leave out --dense, --plan, --method, --macs and the like"
        )
    described = build_preprocessing(network, preprocessing)
    samples = _samples(images, described)
    if not (dense or saved):
        assert not isinstance(config, Escalation)
        needed = samples if heads_need_images(config) else None
        prune_(network, config, calibration=None if needed is None else calibrate(network, needed))
    with stage_bar(STAGES) as on_message:
        found = export(
            network,
            out,
            options,
            images=samples,
            preprocessing=described,
            classes=class_names(network),
            on_message=on_message,
        )
    show(export_text(found))
    say(f"written: {out}")
    write_record(found, json)


def _samples(options: ExportImages, preprocessing: Preprocessing) -> Tensor | None:
    if options.calibration is None:
        return None
    source = find_samples(options.calibration).limited(options.calibration_limit, options.seed)
    batches = make_loader(source, preprocessing, labels=None, batch_size=32)
    return torch.cat([batch.images for batch in progress(batches, "images", len(batches))])
