"""Options that several subcommands share. The help text of every flag is the docstring below its field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ModelOptions:
    """Which model, with which weights, and where it runs."""

    model: str
    """A timm name (deit_tiny_patch16_224 ...), ViT-B_16, ViT-B_32, ViT-L_16, ViT-L_32, ViT-H_14, hf:FOLDER_OR_ID,
    torchvision:vit_b_16, open_clip:ViT-B-32 (with weights open_clip:ViT-B-32:TAG), or a folder that save_pruned or
    Hugging Face's save_pretrained wrote."""
    checkpoint: Path | None = None
    """Weights: timm or Hugging Face .safetensors, DeiT's or the CP-ViT project's .pth, Google's .npz."""
    pretrained: bool = False
    """Download the model's published weights instead."""
    num_classes: int | None = None
    """Classes of the head; by default what the checkpoint has."""
    image_size: tuple[int, ...] | None = None
    """Side of the square image, or height and width; by default the model's own."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of weights and arithmetic."""


@dataclass(frozen=True)
class DataOptions:
    """Which images."""

    data: str
    """cifar10, cifar100, a folder of class folders, a .tar or .tar.gz of one, or shards."""
    data_dir: Path | None = None
    """Where cifar10 or cifar100 lies (or is put by --download)."""
    download: bool = False
    """Fetch cifar10 or cifar100 if it is not there."""
    split: str | None = None
    """train, val or test, where the data has several; by default the held-out one."""
    limit: int | None = None
    """Use a random sample of this many images, spread over the classes."""
    leave_out: int | None = None
    """Leave out the sample that --limit with this number and the same seed takes: what a plan was made on."""
    skip_bad_images: bool = False
    """Leave unreadable images out, count and name them, instead of stopping."""
    batch_size: int = 64
    """Images per forward."""
    workers: int = 0
    """Processes that decode images; 0 decodes in this one, by its threads, which is faster on a CPU."""
    seed: int = 0
    """Of every random choice."""


@dataclass(frozen=True)
class EndToEndOptions:
    """Real images, to time their way from the file to the answer."""

    end_to_end: bool = False
    """Time decoding and preprocessing along with the forward, on the images of --data."""
    data: str | None = None
    """For --end-to-end: a folder of images or of class folders, a .tar or .tar.gz of one, or shards."""
    split: str | None = None
    """train, val or test, where the data has several; by default the held-out one."""
    limit: int | None = None
    """Use a random sample of this many images."""
    workers: int = 0
    """Processes that decode images; 0 decodes in this one, between the forwards."""
    skip_bad_images: bool = False
    """Leave unreadable images out instead of stopping."""

    def check(self) -> None:
        """Raise ValueError if one of the two is given without the other."""
        if self.end_to_end and self.data is None:
            raise ValueError("--end-to-end times the way of real images: give --data as well")
        if self.data is not None and not self.end_to_end:
            raise ValueError(
                "--data is for --end-to-end; without it the forward alone is timed, on random images"
            )


@dataclass(frozen=True)
class PreprocessingOptions:
    """How images become tensors; by default as the model was trained."""

    mean: tuple[float, float, float] | None = None
    """Subtracted per channel, e.g. 0.5 0.5 0.5."""
    std: tuple[float, float, float] | None = None
    """Divided by, per channel."""
    interpolation: str | None = None
    """Of the resize: bilinear, bicubic ..."""
    crop_pct: float | None = None
    """Part of the resized image that the centre crop keeps."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Unlabelled images that the schedule and the choice of heads are made from."""

    calibration: str | None = None
    """A folder or a .tar of images, or shards; with it the schedule is layer-aware."""
    calibration_limit: int = 64
    """How many of them to use (seeded sample)."""


@dataclass(frozen=True)
class RecordOptions:
    """What is kept of the result."""

    json: Path | None = None
    """Write the record behind what is printed to this file."""
    report: Path | None = None
    """Write a page about it to this file: charts, plan, pictures, in one HTML file (needs cpvit[report])."""


@dataclass(frozen=True)
class ImageRecordOptions(RecordOptions):
    """What is kept of the result."""

    gallery: int | None = None
    """Show what becomes of the patches of this many images, and as many of those that were lost; by default 4 with
    --report, else none. Small copies of these images are then part of the record."""

    @property
    def shown(self) -> int:
        """Images of the gallery."""
        if self.gallery is None:
            return 0 if self.report is None else GALLERY
        return self.gallery


GALLERY = 4
