"""Batches to train on, addressable by position: the batch of a step never depends on what came before.

See `cpvit.data.order` for which samples a step takes and `cpvit.data.augment` for what happens to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cpvit.data.augment import (
    Augmentation,
    Mixer,
    Mixing,
    preserved_generators,
    seed_generators,
)
from cpvit.data.images import SKIP_HINT, BadImageError
from cpvit.data.loader import sample_labels
from cpvit.data.order import Numbers, Share, augmentation_seed, mixing_seed, shuffled
from cpvit.data.preprocess import Preprocessing, Transform
from cpvit.data.records import ImageSource, Reader
from cpvit.data.shards import ShardSource, shuffled_stream

__all__ = ["Augmentation", "Mixing", "TrainBatch", "TrainBatches", "make_train_batches"]


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


class TrainImage(NamedTuple):
    """A decoded sample: its number in the run, the image and the label."""

    number: int
    image: Image.Image
    label: int


class TrainImages(Protocol):
    """Samples in training order. Must survive pickling, because loader workers get a copy."""

    def __len__(self) -> int: ...

    def stream(self, share: Share) -> Iterator[TrainImage]:
        """The samples of `share` in the order of their numbers, without end."""
        ...


@dataclass(frozen=True)
class ListedImages:
    """Images that can be read in any order, in a new permutation each epoch."""

    keys: tuple[str, ...]
    labels: Numbers
    reader: Reader
    seed: int

    def __len__(self) -> int:
        return len(self.keys)

    def stream(self, share: Share) -> Iterator[TrainImage]:
        """See `TrainImages`."""
        epoch, order = -1, np.empty(0, np.int64)
        for step in share.steps():
            for number in share.numbers(step):
                if number // len(self) != epoch:
                    epoch = number // len(self)
                    order = shuffled(len(self), self.seed, epoch)
                index = int(order[number % len(self)])
                yield TrainImage(number, self.reader.read(self.keys[index]), int(self.labels[index]))


@dataclass(frozen=True)
class StreamedImages:
    """Images in shards, through a shuffle buffer of `buffer` samples."""

    source: ShardSource
    labels: Mapping[str, int]
    seed: int
    buffer: int

    def __len__(self) -> int:
        return len(self.source)

    def stream(self, share: Share) -> Iterator[TrainImage]:
        """See `TrainImages`."""
        for number, sample in shuffled_stream(self.source, share, self.seed, self.buffer):
            yield TrainImage(number, sample.decoded(), sample.label_in(self.labels))


@dataclass(frozen=True)
class _Failure:
    """An error on its way out of a worker as a value: raised there, it would arrive wrapped in a traceback."""

    error: ValueError | OSError


@dataclass(frozen=True)
class _BatchMaker:
    """Augments, stacks and mixes the samples of a step."""

    transform: Transform
    mixer: Mixer
    seed: int

    def __call__(self, step: int, rank: int, samples: Iterator[TrainImage]) -> TrainBatch:
        with preserved_generators():
            images, labels = zip(*(self._augmented(sample) for sample in samples), strict=True)
            seed_generators(mixing_seed(self.seed, step, rank))
            label_tensor = torch.tensor(labels, dtype=torch.int64)
            mixed, targets = self.mixer(torch.stack(images), label_tensor)
        return TrainBatch(step, mixed, label_tensor, targets)

    def _augmented(self, sample: TrainImage) -> tuple[Tensor, int]:
        seed_generators(augmentation_seed(self.seed, sample.number))
        return self.transform(sample.image), sample.label


class _Steps(IterableDataset[TrainBatch | _Failure]):
    """What each loader worker runs: whole batches of its share of the steps."""

    def __init__(self, images: TrainImages, make_batch: _BatchMaker, share: Share) -> None:
        self._images = images
        self._make_batch = make_batch
        self._share = share

    def __iter__(self) -> Iterator[TrainBatch | _Failure]:
        worker = get_worker_info()
        share = self._share if worker is None else self._share.of_worker(worker.id, worker.num_workers)
        samples = self._images.stream(share)
        try:
            for step in share.steps():
                yield self._make_batch(step, share.rank, islice(samples, share.batch_size))
        except (ValueError, OSError) as error:
            yield _Failure(error)


class TrainBatches:
    """The endless sequence of training batches of one process; see `make_train_batches`.

    Attributes:
        num_images: Images in an epoch, over all processes.
        steps_per_epoch: Steps until every image has come at least once. Where the global batch does not
            divide the images, the last of them reaches into the next epoch.
    """

    def __init__(
        self, images: TrainImages, make_batch: _BatchMaker, share: Share, *, num_workers: int
    ) -> None:
        self._images = images
        self._make_batch = make_batch
        self._share = share
        self._num_workers = num_workers
        self.num_images = len(images)
        self.steps_per_epoch = -(-len(images) // (share.batch_size * share.world_size))

    def starting_at(self, step: int) -> Iterator[TrainBatch]:
        """The batches of `step`, `step + 1`, ... without end: the same as an uninterrupted run has there.

        Loader workers start with the first batch and live as long as the iterator.

        Raises:
            BadImageError: While iterating, on an image that cannot be decoded.
            BadArchiveError: While iterating, on a damaged archive or shard.
        """
        share = replace(self._share, first=step)
        # Whole batches come out of the dataset, hence no batching here. The generator is its own, because
        # a DataLoader otherwise draws from the global one.
        loader = DataLoader(
            _Steps(self._images, self._make_batch, share),
            batch_size=None,
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
    source: ImageSource | ShardSource,
    preprocessing: Preprocessing,
    *,
    labels: Mapping[str, int],
    num_classes: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    augmentation: Augmentation,
    mixing: Mixing,
    label_smoothing: float = 0.0,
    shuffle_buffer: int = 5000,
) -> TrainBatches:
    """Shuffled, augmented and mixed batches that can start at any step.

    The batch of a step is a function of the data, the seed, the step, the rank and the number of processes:
    not of `num_workers`, nor of where iteration began. Two processes with batches of b meet, together, the
    images and augmentations of one process with batches of 2b; mixing stays within a process's batch, so it
    differs. The global random generators are left as they are.

    Args:
        source: From `open_data(..., split="train")`.
        preprocessing: Usually `Preprocessing.from_model(model)`.
        labels: From `label_map`.
        num_classes: Outputs of the model's head.
        batch_size: Images per step on this process; even if batches are mixed.
        seed: At least 0.
        rank: This process among `world_size`.
        world_size: Processes that train together.
        num_workers: Processes that decode and augment; 0 does it in this one.
        augmentation: Of single images.
        mixing: Of batches.
        label_smoothing: Part of a target spread evenly over all classes (arXiv 1512.00567).
        shuffle_buffer: For shards: samples among which each is shuffled, beside the order of the shards. All
            loader workers of all processes together hold about half of as many encoded images.

    Raises:
        ValueError: An option out of range, an image without a label, or a label that the head lacks.

    Example:
        >>> batches = make_train_batches(  # doctest: +SKIP
        ...     source, preprocessing, labels=label_map(source, 10), num_classes=10, batch_size=64, seed=0,
        ...     augmentation=Augmentation(), mixing=Mixing(mixup=0.8),
        ... )
        >>> for batch in batches.starting_at(1000):  # doctest: +SKIP
        ...     loss = criterion(model(batch.images), batch.targets)
    """
    if seed < 0 or num_workers < 0:
        raise ValueError(f"seed is {seed} and num_workers {num_workers}; expected at least 0 for both")
    if mixing.active and batch_size % 2:
        raise ValueError(f"batch_size is {batch_size}, but mixing blends images in pairs; make it even")
    if shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer is {shuffle_buffer}; expected at least 1 sample (1: no shuffling)")
    share = Share(batch_size, rank, world_size)
    make_batch = _BatchMaker(
        augmentation.transform(preprocessing), Mixer(mixing, num_classes, label_smoothing), seed
    )
    _check_head(labels, num_classes)
    images = (
        _listed(source, labels, seed)
        if isinstance(source, ImageSource)
        else StreamedImages(source, labels, seed, shuffle_buffer)
    )
    return TrainBatches(images, make_batch, share, num_workers=num_workers)


def _listed(source: ImageSource, labels: Mapping[str, int], seed: int) -> ListedImages:
    if not source.samples:
        raise ValueError(f"{source.name} holds no images")
    keys = tuple(sample.key for sample in source.samples)
    numbers = np.array(sample_labels(source, labels), np.int64)
    return ListedImages(keys, numbers, source.reader.select(keys), seed)


def _check_head(labels: Mapping[str, int], num_classes: int) -> None:
    wrong = {name: label for name, label in labels.items() if not 0 <= label < num_classes}
    if wrong:
        name, label = next(iter(wrong.items()))
        raise ValueError(
            f"class {name} has label {label}, but the head has {num_classes} classes: expected labels from "
            f"0 to {num_classes - 1}; build them with label_map(source, {num_classes})"
        )
