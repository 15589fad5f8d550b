"""Batches to train on, addressable by position: the batch of a step never depends on what came before.

See `cpvit.data.order` for which samples a step takes and `cpvit.data.augment` for what happens to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cpvit.data.augment import (
    Augmentation,
    Mixer,
    Mixing,
    preserved_generators,
    seed_generators,
)
from cpvit.data.images import SKIP_HINT, BadImageError
from cpvit.data.labels import sample_labels
from cpvit.data.order import Numbers, SampleOrder, Share, augmentation_seed, mixing_seed
from cpvit.data.preprocess import Preprocessing, Transform
from cpvit.data.records import ImageSource, Reader, Sample
from cpvit.data.shard_index import ShardSource

__all__ = [
    "Augmentation",
    "Mixing",
    "TrainBatch",
    "TrainBatches",
    "TrainLoaderOptions",
    "make_train_batches",
]


@dataclass(frozen=True)
class TrainLoaderOptions:
    """How training batches are made.

    Attributes:
        batch_size: Images per step on this process; even if batches are mixed.
        seed: At least 0.
        augmentation: Of single images.
        mixing: Of batches.
        label_smoothing: Part of a target spread evenly over all classes (arXiv 1512.00567).
        num_workers: Processes that decode and augment; 0 does it in this one.
        rank: This process among `world_size`.
        world_size: Processes that train together.
        shuffle_buffer: For shards: samples among which each is shuffled, beside the order of the shards.
    """

    batch_size: int
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    mixing: Mixing = field(default_factory=Mixing)
    label_smoothing: float = 0.0
    num_workers: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle_buffer: int = 5000

    def __post_init__(self) -> None:
        if self.seed < 0 or self.num_workers < 0:
            raise ValueError(
                f"seed is {self.seed} and num_workers {self.num_workers}; expected at least 0 for both"
            )
        if self.mixing.active and self.batch_size % 2:
            raise ValueError(
                f"batch_size is {self.batch_size}, but mixing blends images in pairs; make it even"
            )
        if self.shuffle_buffer < 1:
            raise ValueError(
                f"shuffle_buffer is {self.shuffle_buffer}; expected at least 1 sample (1: no shuffling)"
            )
        self.share()

    def share(self) -> Share:
        """The samples of this process."""
        return Share(self.batch_size, self.rank, self.world_size)


@dataclass(frozen=True)
class TrainBatch:
    """The batch of one step on one process.

    Attributes:
        step: Its position, from 0.
        images: float32 `[B 3 H W]`, augmented, normalised and mixed.
        labels: int64 `[B]`, of the images before mixing.
        targets: float32 `[B classes]`, mixed and smoothed, each row summing to one; None if neither mixing
            nor label smoothing is asked for, for then the labels are the targets.
    """

    step: int
    images: Tensor
    labels: Tensor
    targets: Tensor | None


@dataclass(frozen=True)
class _Failure:
    """An error on its way out of a worker as a value: raised there, it would arrive wrapped in a traceback."""

    error: ValueError | OSError


@dataclass(frozen=True)
class _BatchMaker:
    """Augments, stacks and mixes the images of a step."""

    transform: Transform
    mixer: Mixer
    seed: int

    def __call__(
        self, step: int, rank: int, numbers: Sequence[int], images: Iterator[Image.Image], labels: Tensor
    ) -> TrainBatch:
        with preserved_generators():
            stacked = torch.stack([self._augmented(*pair) for pair in zip(numbers, images, strict=True)])
            seed_generators(mixing_seed(self.seed, step, rank))
            mixed, targets = self.mixer(stacked, labels)
        return TrainBatch(step, mixed, labels, targets)

    def _augmented(self, number: int, image: Image.Image) -> Tensor:
        seed_generators(augmentation_seed(self.seed, number))
        return self.transform(image)


@dataclass(frozen=True)
class _TrainImages:
    """Images and their labels `[images]`, by index."""

    samples: Sequence[Sample]
    labels: Numbers
    reader: Reader

    def read(self, index: int) -> Image.Image:
        return self.reader.read(self.samples[index].key)


class _Steps(Dataset[TrainBatch | _Failure]):
    """The batch of each step, as a map-style data set; must survive pickling, because workers get a copy."""

    def __init__(
        self, images: _TrainImages, order: SampleOrder, make_batch: _BatchMaker, share: Share
    ) -> None:
        self._images = images
        self._order = order
        self._make_batch = make_batch
        self._share = share

    def __getitem__(self, step: int) -> TrainBatch | _Failure:
        numbers = self._share.numbers(step)
        indices = [self._order.index(number) for number in numbers]
        labels = torch.from_numpy(self._images.labels[indices])
        try:
            images = map(self._images.read, indices)
            return self._make_batch(step, self._share.rank, numbers, images, labels)
        except (ValueError, OSError) as error:
            return _Failure(error)


class _StepsFrom(Sampler[int]):
    """All steps from one on, without end."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return count(self._first)


class TrainBatches:
    """The endless sequence of training batches of one process; see `make_train_batches`.

    Attributes:
        num_images: Images in an epoch, over all processes.
        steps_per_epoch: Steps until every image has come at least once. Where the global batch does not
            divide the images, the last of them reaches into the next epoch.
    """

    def __init__(self, steps: _Steps, num_images: int, share: Share, *, num_workers: int) -> None:
        self._steps = steps
        self._num_workers = num_workers
        self.num_images = num_images
        self.steps_per_epoch = -(-num_images // (share.batch_size * share.world_size))

    def starting_at(self, step: int) -> Iterator[TrainBatch]:
        """The batches of `step`, `step + 1`, ... without end: the same as an uninterrupted run has there.

        Loader workers start with the first batch and live as long as the iterator.

        Raises:
            ValueError: The step is negative.
            BadImageError: While iterating, on an image that cannot be decoded.
            BadArchiveError: While iterating, on a damaged archive or shard.
        """
        if step < 0:
            raise ValueError(f"step is {step}; expected at least 0")
        # Whole batches come out of the data set, hence no batching here. The generator is its own, because
        # a DataLoader otherwise draws from the global one.
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=_StepsFrom(step),
            num_workers=self._num_workers,
            generator=torch.Generator(),
        )
        return _unwrapped(loader)


def _unwrapped(loader: DataLoader[TrainBatch | _Failure]) -> Iterator[TrainBatch]:
    for item in loader:
        result = cast("TrainBatch | _Failure", item)
        if isinstance(result, _Failure):
            raise _without_skip_hint(result.error)
        yield result


def _without_skip_hint(error: ValueError | OSError) -> ValueError | OSError:
    """Leaving images out would shift all that follow, so training does not offer it."""
    return BadImageError(str(error).removesuffix(SKIP_HINT)) if isinstance(error, BadImageError) else error


def make_train_batches(
    source: ImageSource,
    preprocessing: Preprocessing,
    options: TrainLoaderOptions,
    *,
    labels: Mapping[str, int],
    num_classes: int,
) -> TrainBatches:
    """Shuffled, augmented and mixed batches that can start at any step.

    The batch of a step is a function of the data, the seed, the step, the rank and the number of processes:
    not of `num_workers`, nor of where iteration began. Two processes with batches of b meet, together, the
    images and augmentations of one process with batches of 2b; mixing stays within a process's batch, so it
    differs. The global random generators are left as they are.

    Args:
        source: From `find_samples(..., split="train")`.
        preprocessing: Usually `Preprocessing.from_model(model)`.
        options: Batch size, augmentation, processes.
        labels: From `label_map`.
        num_classes: Outputs of the model's head.

    Raises:
        ValueError: An option out of range, an image without a label, or a label that the head lacks.

    Example:
        >>> options = TrainLoaderOptions(batch_size=64, mixing=Mixing(mixup=0.8))
        >>> batches = make_train_batches(  # doctest: +SKIP
        ...     source, preprocessing, options, labels=label_map(source, 10), num_classes=10
        ... )
        >>> for batch in batches.starting_at(1000):  # doctest: +SKIP
        ...     loss = criterion(model(batch.images), batch.targets)
    """
    _check_head(labels, num_classes)
    if not len(source):
        raise ValueError(f"{source.name} holds no images")
    images = _TrainImages(
        source.samples,
        sample_labels(source, labels),
        source.reader.select(sample.key for sample in source.samples),
    )
    make_batch = _BatchMaker(
        options.augmentation.transform(preprocessing),
        Mixer(options.mixing, num_classes, options.label_smoothing),
        options.seed,
    )
    share = options.share()
    steps = _Steps(images, _sample_order(source, options), make_batch, share)
    return TrainBatches(steps, len(source), share, num_workers=options.num_workers)


def _sample_order(source: ImageSource, options: TrainLoaderOptions) -> SampleOrder:
    """A new permutation each epoch; images in shards stay near those that lie beside them."""
    if isinstance(source, ShardSource):
        return SampleOrder(len(source), options.seed, source.sizes, options.shuffle_buffer)
    return SampleOrder(len(source), options.seed)


def _check_head(labels: Mapping[str, int], num_classes: int) -> None:
    wrong = {name: label for name, label in labels.items() if not 0 <= label < num_classes}
    if wrong:
        name, label = next(iter(wrong.items()))
        raise ValueError(
            f"class {name} has label {label}, but the head has {num_classes} classes: expected labels from "
            f"0 to {num_classes - 1}; build them with label_map(source, {num_classes})"
        )
