"""The options of ``cpvit finetune``. The help text of every flag is the docstring below its field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpvit.commands.options import RecordOptions
from cpvit.data import Augmentation, Mixing


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
class OutputOptions:
    """What is pruned, and where results go."""

    output_dir: Path
    """Where the best and the last model, the checkpoint to resume from and the record go."""
    plan: Path | None = None
    """A plan written by ``cpvit plan``, instead of a method and a budget."""
    dense: bool = False
    """Prune nothing."""
    resume: bool = False
    """Resume from the checkpoint in the output folder."""
    tensorboard: bool = True
    """Write curves for TensorBoard into the output folder."""
    json: Path | None = None
    """Write the record behind what is printed to this file as well."""
    report: Path | None = None
    """Write a page about it to this file: curves, plan, settings, in one HTML file (needs cpvit[report])."""

    @property
    def records(self) -> RecordOptions:
        """What is kept besides the folder."""
        return RecordOptions(self.json, self.report)
