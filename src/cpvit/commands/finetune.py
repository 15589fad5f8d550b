"""``cpvit finetune``: train a pruned model (or a dense one, for comparison) on labelled images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from cpvit.adapters import open_host
from cpvit.commands.common import (
    build_calibration,
    build_preprocessing,
    heads_need_images,
    image_size_of,
    planned,
    say,
    set_seed,
    write_record,
)
from cpvit.commands.options import CalibrationOptions, PreprocessingOptions
from cpvit.commands.tables import finetune_text
from cpvit.data import (
    Augmentation,
    Batches,
    ImageSource,
    Mixing,
    Preprocessing,
    ShardSource,
    TrainBatches,
    TrainLoaderOptions,
    find_samples,
    label_map,
    make_loader,
    make_train_batches,
)
from cpvit.finetune import FinetuneConfig, Observer, Processes, Several, finetune, start_processes
from cpvit.finetune.folder import RunFolder
from cpvit.finetune.log import TensorBoard
from cpvit.finetune.progress import Bar
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig
from cpvit.plans.plan import Plan
from cpvit.plans.resolve import make_plan
from cpvit.pruning.calibrate import calibrate
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint
from cpvit.weights.reading import head_classes


@dataclass(frozen=True)
class StartOptions:
    """The model to start from."""

    model: str
    """A timm name (deit_tiny_patch16_224 ...) or ViT-B_16, ViT-B_32, ViT-L_16, ViT-L_32, ViT-H_14."""
    checkpoint: Path | None = None
    """Weights to start from; a head for other classes is replaced by a fresh one."""
    pretrained: bool = False
    """Download the model's published weights instead."""
    teacher_checkpoint: Path | None = None
    """Weights of the dense teacher; by default those to start from."""
    num_classes: int | None = None
    """Classes of the head; by default those of the images."""
    image_size: tuple[int, ...] | None = None
    """Side of the square image, or height and width; by default the model's own."""
    drop_path: float = 0.0
    """Probability that the deepest block is skipped in training, less in those before it (timm's models only)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""


@dataclass(frozen=True)
class TrainDataOptions:
    """Which images."""

    data: str
    """cifar10, cifar100, or what holds train/ and test/ or val/: a folder, a .tar, a .tar.gz, or shards."""
    eval_data: str | None = None
    """Images to evaluate on, where they are not part of --data."""
    data_dir: Path | None = None
    """Where cifar10 or cifar100 lies (or is put by --download)."""
    download: bool = False
    """Fetch cifar10 or cifar100 if it is not there."""
    train_limit: int | None = None
    """Train on a random sample of this many images, spread over the classes."""
    eval_limit: int | None = None
    """Evaluate on such a sample."""
    skip_bad_images: bool = False
    """Leave unreadable images out of an evaluation; in training they are an error."""
    eval_batch_size: int = 64
    """Images per forward pass in an evaluation."""
    workers: int = 0
    """Processes that decode images; 0 decodes in this one."""


@dataclass(frozen=True)
class AugmentationOptions:
    """How training images are varied."""

    random_crop: bool = True
    """Crop a random part of the image; otherwise images are prepared as for evaluation."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest part of the image's area in a random crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Strength of random brightness, contrast and saturation."""
    rand_augment: str | None = None
    """timm's RandAugment, e.g. rand-m9-mstd0.5-inc1."""
    random_erasing: float = 0.0
    """Probability that a rectangle is erased."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 for none."""
    mix_probability: float = 1.0
    """Probability that a batch is mixed, if mixup or CutMix is on."""
    mix_switch: float = 0.5
    """Probability of CutMix where both are on."""
    label_smoothing: float = 0.0
    """Probability spread over all classes."""

    def of_image(self) -> Augmentation:
        """What happens to single images."""
        return Augmentation(
            rand_augment=self.rand_augment,
            random_resized_crop=self.random_crop,
            scale=self.crop_scale,
            flip=self.flip,
            color_jitter=self.color_jitter,
            random_erasing=self.random_erasing,
        )

    def of_batch(self) -> Mixing:
        """What happens to batches."""
        return Mixing(
            mixup=self.mixup,
            cutmix=self.cutmix,
            probability=self.mix_probability,
            switch_probability=self.mix_switch,
        )


@dataclass(frozen=True)
class Images:
    """Both splits, opened."""

    train: ImageSource
    test: ImageSource
    num_classes: int

    @property
    def train_labels(self) -> dict[str, int]:
        """Class to index."""
        return label_map(self.train, self.num_classes)

    @property
    def test_labels(self) -> dict[str, int]:
        """Those of the training images, for a test split may lack a class; shards have numbers for names."""
        same_kind = type(self.test) is type(self.train)
        return self.train_labels if same_kind else label_map(self.test, self.num_classes)


def run(
    start: StartOptions,
    data: TrainDataOptions,
    training: FinetuneConfig,
    augmentation: AugmentationOptions,
    pruning: PruneConfig,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    output_dir: Path,
    plan: Path | None = None,
    dense: bool = False,
    resume: bool = False,
    tensorboard: bool = True,
    json: Path | None = None,
) -> None:
    """Finetune a pruned model; --dense trains the untouched one by the same recipe, to compare with.

    Runs in one process, or in as many as ``torchrun`` or ``accelerate launch`` start. Killed at any moment, the
    same command line with --resume goes on.

    Args:
        output_dir: Where the best and the last model, the checkpoint to go on from and the record go.
        plan: A plan written by ``cpvit plan``, instead of a method and a dial.
        dense: Prune nothing.
        resume: Go on from the checkpoint in the output folder.
        tensorboard: Write curves for TensorBoard into the output folder.
        json: Write the record behind what is printed to this file as well.
    """
    wanted = _wanted(pruning, plan, dense)
    processes = start_processes(start.device)
    set_seed(training.seed)
    images = _images(start, data, training.seed)
    model = _model(start, images.num_classes, training, quiet=not processes.is_main).to(processes.device)
    prepared = build_preprocessing(model, preprocessing)
    teacher = _teacher(start, images.num_classes, training)
    statistics = _statistics(model, wanted, calibration, preprocessing, images, training.seed)
    observer: Observer = Bar()
    if tensorboard:
        observer = Several(observer, TensorBoard(RunFolder(output_dir.expanduser()).tensorboard))
    result = finetune(
        model,
        _train_batches(images, prepared, training, augmentation, data.workers, processes),
        _eval_batches(images, prepared, data, processes),
        training,
        output_dir,
        pruning=_resolved(model, wanted, statistics),
        calibration=statistics,
        teacher=teacher,
        resume=resume,
        facts=_facts(start, images, augmentation, prepared),
        observer=observer,
        processes=processes,
    )
    if processes.is_main:
        print(finetune_text(result))
        say(f"models, checkpoint and record: {output_dir}")
        write_record(result, json)
    processes.part()


def _wanted(pruning: PruneConfig, plan: Path | None, dense: bool) -> PruneConfig | Plan | None:
    """What to prune, as asked for."""
    if not dense:
        return planned(pruning, plan)
    if plan is not None or pruning != PruneConfig():
        raise ValueError(
            "--dense prunes nothing; leave out --plan, --method, --macs, --keep-rate and the like"
        )
    return None


def _images(start: StartOptions, data: TrainDataOptions, seed: int) -> Images:
    train = find_samples(data.data, split="train", data_dir=data.data_dir, download=data.download)
    if data.eval_data is not None:
        test = find_samples(data.eval_data)
    elif train.split_name is not None:
        test = find_samples(data.data, split="test", data_dir=data.data_dir, download=data.download)
    else:
        raise ValueError(
            f"{data.data} has no train/ and test/ (or val/) folders, so there is nothing apart to evaluate on; "
            "give the evaluation images with --eval-data"
        )
    num_classes = _num_classes(start, train)
    label_map(train, num_classes)  # refuse classes that do not fit the head before anything is limited
    return Images(train.limited(data.train_limit, seed), test.limited(data.eval_limit, seed), num_classes)


def _num_classes(start: StartOptions, train: ImageSource) -> int:
    """As asked for, or the head of the checkpoint where the images' classes fit it, or one per class folder."""
    if start.num_classes is not None:
        return start.num_classes
    in_file = None if start.checkpoint is None else head_classes(start.checkpoint)
    if isinstance(train, ShardSource):
        if in_file is None:
            raise ValueError(f"{train.name} does not say how many classes it has; give --num-classes")
        return in_file
    if in_file is not None and in_file > len(train.classes) and _known(train, in_file):
        return in_file
    return len(train.classes)


def _known(train: ImageSource, num_classes: int) -> bool:
    """Whether a head of so many classes has a place for every class of the images (a subset of ImageNet's)."""
    try:
        label_map(train, num_classes)
    except ValueError:
        return False
    return True


def _model(start: StartOptions, num_classes: int, training: FinetuneConfig, *, quiet: bool) -> nn.Module:
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
    open_host(model)  # refuse what cannot be pruned before reading large files
    if start.checkpoint is None:
        return model
    report = load_checkpoint(model, start.checkpoint, replace_head=True)
    if report.head_replaced is None:
        _say(report.summary(), quiet)
        return model
    _say(f"{report.summary()}; the new head starts from random weights", quiet)
    if training.distillation.distill and start.teacher_checkpoint is None:
        raise ValueError(
            f"{start.checkpoint} has no head for these {num_classes} classes, so the model it starts from has no "
            "opinion to distil; give a dense model finetuned on them (--teacher-checkpoint FILE), or only "
            "--distill-features"
        )
    return model


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        say(text)


def _teacher(start: StartOptions, num_classes: int, training: FinetuneConfig) -> nn.Module | None:
    if start.teacher_checkpoint is None:
        return None
    if not training.distillation.wanted:
        raise ValueError("--teacher-checkpoint is used by --distill and --distill-features; give one of them")
    teacher = create_model(start.model, num_classes=num_classes, image_size=image_size_of(start.image_size))
    load_checkpoint(teacher, start.teacher_checkpoint, replace_head=not training.distillation.distill)
    return teacher


def _resolved(
    model: nn.Module, wanted: PruneConfig | Plan | None, statistics: Calibration | None
) -> PruneConfig | Plan | None:
    """What depends on calibration images becomes a plan here, so that a run that goes on finds the same."""
    if statistics is None or not isinstance(wanted, PruneConfig):
        return wanted
    return make_plan(open_host(model), wanted, statistics)


def _statistics(
    model: nn.Module,
    wanted: PruneConfig | Plan | None,
    calibration: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    images: Images,
    seed: int,
) -> Calibration | None:
    """On the calibration images; where heads need some and none are given, on training images; else None."""
    if calibration.calibration is not None:
        return build_calibration(model, calibration, preprocessing, seed=seed)
    if wanted is None or not heads_need_images(wanted):
        return None
    batches = make_loader(
        images.train.limited(calibration.calibration_limit, seed),
        build_preprocessing(model, preprocessing),
        labels=None,
        batch_size=16,
    )
    return calibrate(model, (batch.images for batch in batches))


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


def _facts(
    start: StartOptions,
    images: Images,
    augmentation: AugmentationOptions,
    prepared: Preprocessing,
) -> dict[str, Any]:
    """What must be the same when the run goes on. Files may have moved; what is in them counts."""
    return {
        "checkpoint": _digest_of_file(start.checkpoint),
        "pretrained": start.pretrained,
        "drop_path": start.drop_path,
        "teacher_checkpoint": _digest_of_file(start.teacher_checkpoint),
        "num_classes": images.num_classes,
        "train_images": _identity(images.train),
        "eval_images": _identity(images.test),
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


def _identity(source: ImageSource) -> str:
    """How many images, and which: their names below the source, and their classes."""
    if not isinstance(source, ShardSource):
        names: list[Any] = [(sample.key, sample.class_name) for sample in source.samples]
    else:
        names = [(shard.name, size) for shard, size in zip(source.shards, source.sizes, strict=True)]
        if source.is_part:
            names += source.samples.places.tolist()
    return f"{len(source)} (sha256 of the names {sha256(repr(names).encode()).hexdigest()[:16]})"
