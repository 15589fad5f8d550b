"""From rows to batches of pixels: loader workers read and decode, and an account is kept of how long that takes.

Pixels travel as bytes, a quarter of what normalised images take, and are normalised where the model is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cpvit.bulk.sources import Source
from cpvit.data import BadImageError, Preprocessing
from cpvit.data.images import SKIP_HINT, decode
from cpvit.data.threads import side_by_side


@dataclass(frozen=True)
class PixelBatch:
    """A batch of B images of one part; rows whose image is bad have a reason and no pixels.

    Attributes:
        part: Number of the part.
        rows: Numbers of the B rows.
        keys: What the images are called.
        errors: Why an image could not be read; None for the b that could.
        pixels: uint8 ``[b 3 H W]``; None if b is 0.
        read_seconds: Of the process, spent on reading the files.
        decode_seconds: Spent on decoding, resizing and cropping.
    """

    part: int
    rows: tuple[int, ...]
    keys: tuple[str, ...]
    errors: tuple[str | None, ...]
    pixels: Tensor | None
    read_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class _Image:
    """One image of a batch; it has pixels uint8 ``[3 H W]`` or an error."""

    key: str
    error: str | None
    pixels: Tensor | None
    read_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class _Failed:
    """An error that concerns more than one image, on its way out of a worker."""

    error: Exception


@dataclass(frozen=True)
class LoaderOptions:
    """How images are loaded."""

    batch_size: int = 32
    workers: int = 0
    pin_memory: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                f"batch_size is {self.batch_size} and workers {self.workers}; expected at least 1 and 0"
            )


_Batch = tuple[int, range]


class _BatchReader(Dataset[Any]):
    """Reads a whole batch at a time, which a loader's worker hands over as one piece."""

    def __init__(self, source: Source, preprocessing: Preprocessing) -> None:
        self._source = source
        self._transform = preprocessing.pixel_transform()

    def __getitem__(self, batch: _Batch) -> PixelBatch | _Failed:
        part, rows = batch
        start = time.perf_counter()
        try:
            images = side_by_side(self._image, rows)
        except (ValueError, OSError) as error:
            return _Failed(error)
        pixels = [image.pixels for image in images if image.pixels is not None]
        return PixelBatch(
            part,
            tuple(rows),
            tuple(image.key for image in images),
            tuple(image.error for image in images),
            torch.stack(pixels) if pixels else None,
            *_shares(images, time.perf_counter() - start),
        )

    def _image(self, row: int) -> _Image:
        start = time.perf_counter()
        key = self._source.key(row)
        try:
            data = self._source.read(row)
            between = time.perf_counter()
            pixels = self._transform(decode(data, key))
        except BadImageError as error:
            return _Image(key, str(error).removesuffix(SKIP_HINT), None, 0.0, 0.0)
        return _Image(key, None, pixels, between - start, time.perf_counter() - between)


def _shares(images: Sequence[_Image], seconds: float) -> tuple[float, float]:
    """Of the seconds that a batch took, what went into reading and what into decoding, whose threads overlap."""
    reading = sum(image.read_seconds for image in images)
    decoding = sum(image.decode_seconds for image in images)
    scale = seconds / max(reading + decoding, 1e-9)
    return reading * scale, decoding * scale


class _Order:
    """The batches of some parts, made one at a time."""

    def __init__(self, parts: Sequence[tuple[int, range]], batch_size: int) -> None:
        self._parts = parts
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[_Batch]:
        for part, rows in self._parts:
            for start in range(0, len(rows), self._batch_size):
                yield part, rows[start : start + self._batch_size]


def load_batches(
    source: Source,
    preprocessing: Preprocessing,
    parts: Sequence[tuple[int, range]],
    options: LoaderOptions,
) -> Iterator[PixelBatch]:
    """The images of some parts, in order. No batch reaches into the next part, so a part does not depend on others.

    Args:
        source: All images.
        preprocessing: How they become pixels.
        parts: Number and rows of each.
        options: Batch size and workers.

    Raises:
        BadArchiveError: A file that holds images is damaged.
    """
    loader = DataLoader(
        _BatchReader(source, preprocessing),
        sampler=cast("Any", _Order(parts, options.batch_size)),
        batch_size=None,
        num_workers=options.workers,
        pin_memory=options.pin_memory,
        # Its own generator, because a DataLoader otherwise draws from the global one.
        generator=torch.Generator(),
        prefetch_factor=4 if options.workers else None,
    )
    for batch in loader:
        if isinstance(batch, _Failed):
            raise batch.error
        yield batch
