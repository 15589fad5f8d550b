"""``cpvit finetune``: train a pruned model (or a dense one, for comparison) on labelled images."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from cpvit.adapters import Host
from cpvit.commands.common import (
    build_calibration,
    build_preprocessing,
    heads_need_images,
    image_size_of,
    planned,
    say,
    set_seed,
)
from cpvit.commands.finetune_images import Images, identity, open_images
from cpvit.commands.finetune_options import (
    AugmentationOptions,
    OutputOptions,
    StartOptions,
    TrainDataOptions,
)
from cpvit.commands.options import CalibrationOptions, PreprocessingOptions
from cpvit.commands.records import check_output, keep
from cpvit.commands.tables import finetune_text
from cpvit.commands.terminal import is_quiet, show
from cpvit.data import (
    Batches,
    Preprocessing,
    TrainBatches,
    TrainLoaderOptions,
    make_loader,
    make_train_batches,
)
from cpvit.finetune import (
    Callback,
    CallbackList,
    FinetuneConfig,
    Processes,
    RunOptions,
    finetune,
    start_processes,
)
from cpvit.finetune.progress import ProgressBar
from cpvit.finetune.tensorboard import TensorBoard
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig
from cpvit.plans.escalation import Escalation
from cpvit.plans.plan import Plan
from cpvit.plans.resolve import make_plan
from cpvit.pruning.calibrate import calibrate_host
from cpvit.pruning.opening import open_untouched
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint


def run(
    start: StartOptions,
    data: TrainDataOptions,
    training: FinetuneConfig,
    augmentation: AugmentationOptions,
    pruning: PruneConfig,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    output: OutputOptions,
) -> None:
    """Finetune a pruned model; --dense trains the untouched one with the same settings, to compare with.

    Runs in one process, or in as many as ``torchrun`` or ``accelerate launch`` start. Killed at any moment, the
    same command line with --resume goes on.
    """
    check_output(output.records)
    wanted = _wanted(pruning, output)
    processes = start_processes(start.device, logging_dir=output.output_dir.expanduser())
    set_seed(training.seed)
    images = open_images(start, data, training.seed)
    student = _student(start, images.num_classes, training, quiet=not processes.is_main)
    student.model.to(processes.device)
    prepared = build_preprocessing(student.model, preprocessing)
    teacher = _teacher(start, images.num_classes, training)
    statistics = _statistics(student, wanted, calibration, preprocessing, images, training.seed)
    result = finetune(
        student.model,
        _train_batches(images, prepared, training, augmentation, data.workers, processes),
        _eval_batches(images, prepared, data, processes),
        training,
        output.output_dir,
        pruning=_resolved(student, wanted, statistics),
        options=RunOptions(
            resume=output.resume,
            calibration=statistics,
            teacher=teacher,
            fingerprint=_fingerprint(start, images, augmentation, prepared),
            callback=_callback(output, processes),
        ),
        processes=processes,
    )
    if processes.is_main:
        show(finetune_text(result))
        say(f"models, checkpoint and record: {output.output_dir}")
        keep(result, output.records)
    processes.part()


def _wanted(pruning: PruneConfig, output: OutputOptions) -> PruneConfig | Plan | None:
    """What to prune, as asked for."""
    if not output.dense:
        wanted = planned(pruning, output.plan)
        if isinstance(wanted, Escalation):
            raise ValueError(f"{output.plan} holds two plans, and one model is trained; give one plan")
        return wanted
    if output.plan is not None or pruning != PruneConfig():
        raise ValueError(
            "--dense prunes nothing; leave out --plan, --method, --macs, --keep-rate and the like"
        )
    return None


def _student(start: StartOptions, num_classes: int, training: FinetuneConfig, *, quiet: bool) -> Host:
    """The model to train, opened, with the weights it starts from; says what was loaded unless ``quiet``."""
    if start.checkpoint is not None and start.pretrained:
        raise ValueError("give --checkpoint or --pretrained, not both")
    if start.checkpoint is None and not start.pretrained:
        raise ValueError("finetuning starts from trained weights: give --checkpoint FILE, or --pretrained")
    model = create_model(
        start.model,
        num_classes=num_classes,
        image_size=image_size_of(start.image_size),
        pretrained=start.pretrained,
        drop_path=start.drop_path,
    )
    host = open_untouched(model, "finetune")  # refuse what cannot be pruned before reading large files
    if start.checkpoint is None:
        return host
    report = load_checkpoint(model, start.checkpoint, replace_head=True)
    fresh = "" if report.head_replaced is None else "; the new head starts from random weights"
    if not quiet:
        say(f"{report.summary()}{fresh}")
    if (
        report.head_replaced is not None
        and training.distillation.distill
        and start.teacher_checkpoint is None
    ):
        raise ValueError(
            f"{start.checkpoint} has no head for these {num_classes} classes, so the model it starts from has no "
            "opinion to distil; give a dense model finetuned on them (--teacher-checkpoint FILE), or only "
            "--distill-features"
        )
    return host


def _teacher(start: StartOptions, num_classes: int, training: FinetuneConfig) -> nn.Module | None:
    """The dense teacher, if one was given."""
    if start.teacher_checkpoint is None:
        return None
    if not training.distillation.wanted:
        raise ValueError("--teacher-checkpoint is used by --distill and --distill-features; give one of them")
    teacher = create_model(start.model, num_classes=num_classes, image_size=image_size_of(start.image_size))
    load_checkpoint(teacher, start.teacher_checkpoint, replace_head=not training.distillation.distill)
    return teacher


def _callback(output: OutputOptions, processes: Processes) -> Callback:
    """A bar in the terminal, and curves unless they are not wanted."""
    bar = Callback() if is_quiet() else ProgressBar()
    return CallbackList(bar, TensorBoard(processes)) if output.tensorboard else bar


def _resolved(
    student: Host, wanted: PruneConfig | Plan | None, statistics: Calibration | None
) -> PruneConfig | Plan | None:
    """What depends on calibration images becomes a plan here, so that a resumed run finds the same."""
    if statistics is None or not isinstance(wanted, PruneConfig):
        return wanted
    return make_plan(student, wanted, statistics)


def _statistics(
    student: Host,
    wanted: PruneConfig | Plan | None,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    images: Images,
    seed: int,
) -> Calibration | None:
    """On the calibration images; where heads need some and none are given, on training images; else None."""
    if calibration.calibration is not None:
        return build_calibration(student.model, calibration, preprocessing, seed=seed)
    if wanted is None or not heads_need_images(wanted):
        return None
    batches = make_loader(
        images.train.limited(calibration.calibration_limit, seed),
        build_preprocessing(student.model, preprocessing),
        labels=None,
        batch_size=16,
    )
    return calibrate_host(student, (batch.images for batch in batches))


def _train_batches(
    images: Images,
    prepared: Preprocessing,
    training: FinetuneConfig,
    augmentation: AugmentationOptions,
    workers: int,
    processes: Processes,
) -> TrainBatches:
    options = TrainLoaderOptions(
        batch_size=training.micro_batch_size,
        seed=training.seed,
        augmentation=augmentation.of_image(),
        mixing=augmentation.of_batch(),
        label_smoothing=augmentation.label_smoothing,
        num_workers=workers,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    return make_train_batches(
        images.train, prepared, options, labels=images.train_labels, num_classes=images.num_classes
    )


def _eval_batches(
    images: Images, prepared: Preprocessing, data: TrainDataOptions, processes: Processes
) -> Batches:
    return make_loader(
        images.test,
        prepared,
        labels=images.test_labels,
        batch_size=data.eval_batch_size,
        num_workers=data.workers,
        skip_bad_images=data.skip_bad_images,
        rank=processes.rank,
        world_size=processes.world_size,
    )


def _fingerprint(
    start: StartOptions,
    images: Images,
    augmentation: AugmentationOptions,
    prepared: Preprocessing,
) -> dict[str, Any]:
    """What must be the same in a resumed run. Files may have moved; their content counts."""
    return {
        "checkpoint": _digest_of_file(start.checkpoint),
        "pretrained": start.pretrained,
        "drop_path": start.drop_path,
        "teacher_checkpoint": _digest_of_file(start.teacher_checkpoint),
        "num_classes": images.num_classes,
        "train_images": identity(images.train),
        "eval_images": identity(images.test),
        "preprocessing": prepared.to_dict(),
        "augmentation": asdict(augmentation),
    }


def _digest_of_file(path: Path | None) -> str | None:
    if path is None:
        return None
    digest = sha256()
    with path.expanduser().open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return f"{path.name} (sha256 {digest.hexdigest()[:16]})"
