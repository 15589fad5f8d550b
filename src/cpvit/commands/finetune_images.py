"""The images of ``cpvit finetune``: both splits, their classes, and what identifies them."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from cpvit.commands.finetune_options import StartOptions, TrainDataOptions
from cpvit.data import ImageSource, ShardSource, find_samples, label_map
from cpvit.weights.reading import head_classes


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


def open_images(start: StartOptions, data: TrainDataOptions, seed: int) -> Images:
    """List the images of both splits, limited to the samples that are asked for.

    Raises:
        ValueError: There is nothing to evaluate on, or the classes do not fit the head.
    """
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


def identity(source: ImageSource) -> str:
    """How many images, and which: their names below the source, and their classes."""
    if not isinstance(source, ShardSource):
        names: list[Any] = [(sample.key, sample.class_name) for sample in source.samples]
    else:
        names = [(shard.name, size) for shard, size in zip(source.shards, source.sizes, strict=True)]
        if source.is_part:
            names += source.samples.places.tolist()
    return f"{len(source)} (sha256 of the names {sha256(repr(names).encode()).hexdigest()[:16]})"
