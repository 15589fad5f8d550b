"""Batches of images for evaluation, calibration and training, and an account of unreadable files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cpvit.data.images import BadImageError
from cpvit.data.preprocess import Preprocessing, Transform
from cpvit.data.records import ImageSource, Reader


@dataclass(frozen=True)
class Batch:
    """`images` float32 `[B 3 H W]`, `labels` int64 `[B]` or None, and the `keys` of the B samples."""

    images: Tensor
    labels: Tensor | None
    keys: tuple[str, ...]


@dataclass(frozen=True)
class _Item:
    """One sample as a worker hands it over: an image, or the message of what was wrong with the file.

    Errors travel as values, since an exception raised in a worker arrives wrapped in the text of its
    traceback.
    """

    index: int
    image: Tensor | None
    error: str = ""


class _Decoded(Dataset[_Item]):
    """Decodes and transforms the sample at an index."""

    def __init__(self, keys: Sequence[str], reader: Reader, transform: Transform) -> None:
        self._keys = keys
        self._reader = reader
        self._transform = transform

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> _Item:
        try:
            image = self._reader.read(self._keys[index])
        except BadImageError as error:
            return _Item(index, None, str(error))
        return _Item(index, self._transform(image))


@dataclass(frozen=True)
class _Items:
    """A batch on its way to the main process; `images` is `[B 3 H W]`, or None if all files were bad."""

    images: Tensor | None
    good: tuple[int, ...]
    bad: tuple[_Item, ...]


def _collate(items: list[_Item]) -> _Items:
    images = [item.image for item in items if item.image is not None]
    return _Items(
        images=torch.stack(images) if images else None,
        good=tuple(item.index for item in items if item.image is not None),
        bad=tuple(item for item in items if item.image is None),
    )


class Batches:
    """An iterable over the batches of a source; it may be iterated again and gives the same batches.

    Attributes:
        num_images: Images in the source, before any is skipped.
        skipped: Keys of the bad images that the latest iteration has left out so far.
    """

    def __init__(
        self, loader: DataLoader[_Item], keys: Sequence[str], labels: Tensor | None, *, skip_bad_images: bool
    ) -> None:
        self._loader = loader
        self._keys = keys
        self._labels = labels
        self._skip_bad_images = skip_bad_images
        self.num_images = len(keys)
        self.skipped: list[str] = []

    def __len__(self) -> int:
        """Batches at most; one whose images are all bad is not yielded."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = []
        for items in self._loader:
            batch = self._batch(cast("_Items", items))
            if batch is not None:
                yield batch
        if len(self.skipped) == self.num_images:
            raise BadImageError(
                f"none of the {self.num_images} images could be read, for example {self.skipped[0]}"
            )

    def _batch(self, items: _Items) -> Batch | None:
        if items.bad and not self._skip_bad_images:
            raise BadImageError(items.bad[0].error)
        self.skipped += [self._keys[item.index] for item in items.bad]
        if items.images is None:
            return None
        labels = None if self._labels is None else self._labels[list(items.good)]
        return Batch(items.images, labels, tuple(self._keys[index] for index in items.good))


def make_loader(
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    labels: Mapping[str, int] | None,
    batch_size: int,
    num_workers: int = 0,
    skip_bad_images: bool = False,
) -> Batches:
    """Batches of the images of `source`, in its order.

    Args:
        source: From `find_samples`, perhaps limited.
        preprocessing: Usually `Preprocessing.from_model(model)`.
        labels: From `label_map`; None for use without labels, where classes do not matter.
        batch_size: Images per batch; the last one may be smaller.
        num_workers: Processes that decode; 0 decodes in this one.
        skip_bad_images: Leave out files that cannot be read, and list them in `skipped`; else they are an
            error.

    Raises:
        BadImageError: While iterating, on a bad image that may not be skipped, or if all are bad.

    Example:
        >>> for batch in make_loader(source, preprocessing, labels=None, batch_size=64):  # doctest: +SKIP
        ...     model(batch.images)
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"batch_size is {batch_size} and num_workers {num_workers}; expected at least 1 and 0"
        )
    if not source.samples:
        raise ValueError(f"{source.name} holds no images")
    label_tensor = _label_tensor(source, labels)
    keys = [sample.key for sample in source.samples]
    loader = DataLoader(
        _Decoded(keys, source.reader.select(keys), preprocessing.transform()),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=False,
        # Its own generator, because a DataLoader otherwise draws from the global one at each iteration.
        generator=torch.Generator(),
    )
    return Batches(loader, keys, label_tensor, skip_bad_images=skip_bad_images)


def _label_tensor(source: ImageSource, labels: Mapping[str, int] | None) -> Tensor | None:
    if labels is None:
        return None
    missing = [sample.key for sample in source.samples if sample.class_name not in labels]
    if missing:
        raise ValueError(
            f"{source.name} has {len(missing)} images without a label, for example {missing[0]}; put them "
            "into a class folder that `labels` knows, or use labels=None"
        )
    return torch.tensor([labels[sample.class_name or ""] for sample in source.samples], dtype=torch.int64)
