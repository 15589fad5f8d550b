"""Batches of images for evaluation and calibration, and an account of unreadable files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cpvit.data.images import BadImageError
from cpvit.data.labels import sample_labels
from cpvit.data.order import Numbers, check_rank
from cpvit.data.pixels import Normalizer, check_normalizer
from cpvit.data.preprocess import Preprocessing, Transform
from cpvit.data.records import ImageSource, Reader, Sample
from cpvit.data.threads import side_by_side


@dataclass(frozen=True)
class Batch:
    """`images` float32 `[B 3 H W]`, `labels` int64 `[B]` or None, and the `keys` of the B samples."""

    images: Tensor
    labels: Tensor | None
    keys: tuple[str, ...]


@dataclass(frozen=True)
class _Item:
    """One sample as a worker hands it over: pixels uint8 `[3 H W]`, or the message of what was wrong with the file.

    Errors travel as values, since an exception raised in a worker arrives wrapped in the text of its
    traceback. `fatal` is one that concerns more than this image.
    """

    key: str
    label: int | None
    pixels: Tensor | None
    error: str = ""
    fatal: ValueError | OSError | None = None


class _Decoded(Dataset[_Item]):
    """Decodes and transforms the sample at an index."""

    def __init__(
        self, samples: Sequence[Sample], labels: Numbers | None, reader: Reader, transform: Transform
    ) -> None:
        self.samples = samples
        self._labels = labels
        self._reader = reader
        self._transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: Sequence[int]) -> list[_Item]:
        """A batch at a time, which is how a loader asks where it can."""
        return side_by_side(self.__getitem__, indices)

    def __getitem__(self, index: int) -> _Item:
        key = self.samples[index].key
        label = None if self._labels is None else int(self._labels[index])
        try:
            image = self._reader.read(key)
        except BadImageError as error:
            return _Item(key, label, None, str(error))
        except (ValueError, OSError) as error:
            return _Item(key, label, None, fatal=error)
        return _Item(key, label, self._transform(image))


@dataclass(frozen=True)
class _Items:
    """A batch on its way to the main process: what could be read, if anything, and what could not.

    Its images are still bytes, a quarter of what normalised ones take.
    """

    good: Batch | None
    bad: tuple[_Item, ...]


def _collate(items: list[_Item]) -> _Items:
    good = [item for item in items if item.pixels is not None]
    return _Items(_batch(good) if good else None, tuple(item for item in items if item.pixels is None))


def _batch(items: Sequence[_Item]) -> Batch:
    labels = [item.label for item in items if item.label is not None]
    return Batch(
        images=torch.stack([item.pixels for item in items if item.pixels is not None]),
        labels=torch.tensor(labels, dtype=torch.int64) if labels else None,
        keys=tuple(item.key for item in items),
    )


class Batches:
    """An iterable over the batches of a source; it may be iterated again and gives the same batches.

    Attributes:
        num_images: Images in the source, or in this process's share of it, before any is skipped.
        skipped: Keys of the bad images that the latest iteration has left out so far.
    """

    def __init__(
        self,
        loader: DataLoader[_Item],
        normalize: Normalizer,
        num_images: int,
        *,
        batch_size: int,
        skip_bad_images: bool,
        may_be_empty: bool = False,
    ) -> None:
        self._loader = loader
        self._normalize = normalize
        self._batch_size = batch_size
        self._skip_bad_images = skip_bad_images
        self._may_be_empty = may_be_empty
        self.num_images = num_images
        self.skipped: list[str] = []

    def __len__(self) -> int:
        """Batches at most; one whose images are all bad is not yielded."""
        return -(-self.num_images // self._batch_size)

    def picked(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The images `[3 H W]` of these samples, prepared as in every batch; those of other processes are left out."""
        decoded, wanted = cast("_Decoded", self._loader.dataset), set(keys)
        items = [decoded[row] for row, sample in enumerate(decoded.samples) if sample.key in wanted]
        return {item.key: self._normalize(item.pixels[None])[0] for item in items if item.pixels is not None}

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = []
        for item in self._loader:
            items = cast("_Items", item)
            fatal = next((bad.fatal for bad in items.bad if bad.fatal is not None), None)
            if fatal is not None:
                raise fatal
            if items.bad and not self._skip_bad_images:
                raise BadImageError(items.bad[0].error)
            self.skipped += [bad.key for bad in items.bad]
            if items.good is not None:
                yield replace(items.good, images=self._normalize(items.good.images))
        if len(self.skipped) == self.num_images and not self._may_be_empty:
            raise BadImageError(
                f"none of the {self.num_images} images could be read, for example {self.skipped[0]}"
            )


def make_loader(
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    labels: Mapping[str, int] | None,
    batch_size: int,
    num_workers: int = 0,
    skip_bad_images: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Batches of the images of `source`, in its order.

    Of several processes each gets a contiguous share, so that together they see every image exactly once, in the
    batches that one process would have: what a model gives for an image may depend, in the last digit, on the others
    in its batch. Shares differ by at most one batch and may be empty; nothing is repeated to make them equal.

    Args:
        source: From `find_samples`, perhaps limited.
        preprocessing: Usually `Preprocessing.from_model(model)`.
        labels: From `label_map`; None for use without labels, where classes do not matter.
        batch_size: Images per batch; the last one may be smaller.
        num_workers: Processes that decode; 0 decodes in this one.
        skip_bad_images: Leave out files that cannot be read, and list them in `skipped`; else they are an
            error.
        rank: This process among `world_size`.
        world_size: Processes that share the images.

    Raises:
        BadArchiveError: While iterating, on a damaged archive or shard.
        BadImageError: While iterating, on a bad image that may not be skipped, or if all are bad and
            `world_size` is 1 (of several processes one may well have bad images only).

    Example:
        >>> for batch in make_loader(source, preprocessing, labels=None, batch_size=64):  # doctest: +SKIP
        ...     model(batch.images)
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"batch_size is {batch_size} and num_workers {num_workers}; expected at least 1 and 0"
        )
    check_rank(rank, world_size)
    if not len(source):
        raise ValueError(f"{source.name} holds no images")
    # Looked up before they are shared out, so that all processes meet the same error.
    all_labels = None if labels is None else sample_labels(source, labels)
    share = _share(len(source), rank, world_size, batch_size)
    samples = source.samples[share]
    dataset = _Decoded(
        samples,
        None if all_labels is None else all_labels[share],
        source.reader.select(sample.key for sample in samples),
        preprocessing.pixel_transform(),
    )
    check_normalizer(preprocessing)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        # A loader is iterated once for each model: the workers stay, but not beside other processes, whose connections
        # they inherit and keep open: a process that leaves would wait for them forever (gloo).
        persistent_workers=num_workers > 0 and world_size == 1,
        # Pinned memory is for a GPU to fetch from.
        pin_memory=num_workers > 0 and torch.cuda.is_available(),
        # Its own generator, because a DataLoader otherwise draws from the global one at each iteration.
        generator=torch.Generator(),
    )
    return Batches(
        loader,
        Normalizer(preprocessing, torch.device("cpu"), torch.float32),
        share.stop - share.start,
        batch_size=batch_size,
        skip_bad_images=skip_bad_images,
        may_be_empty=world_size > 1,
    )


def _share(size: int, rank: int, world_size: int, batch_size: int) -> slice:
    batches = -(-size // batch_size)
    first, last = (batches * r // world_size * batch_size for r in (rank, rank + 1))
    return slice(min(first, size), min(last, size))
