"""Images that are gone through several times, decoded once: the pixels are kept in a file for the later times."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from cpvit.data.loader import Batch, Batches
from cpvit.data.pixels import Normalizer, pixels_of
from cpvit.data.preprocess import Preprocessing


class DecodedBatches(Batches):
    """The batches of a loader; from the second time on they come from a file, and are the same to the last bit.

    The file holds bytes, a quarter of what normalised images take (ImageNet's validation images: 7.5 GB), in the folder
    for temporary files (TMPDIR). It is gone when :func:`decoded_once` ends, or this process does.
    """

    def __init__(self, batches: Batches, preprocessing: Preprocessing, file: IO[bytes]) -> None:
        self._batches = batches
        self._preprocessing = preprocessing
        self._normalize = Normalizer(preprocessing, torch.device("cpu"), torch.float32)
        self._file = file
        self._kept: list[_Kept] | None = None
        self.num_images = batches.num_images
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self._batches)

    def picked(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """As of the loader, from the files."""
        return self._batches.picked(keys)

    def __iter__(self) -> Iterator[Batch]:
        return self._first_time() if self._kept is None else self._again(self._kept)

    def _first_time(self) -> Iterator[Batch]:
        kept: list[_Kept] = []
        self._file.seek(0)
        for batch in self._batches:
            self._file.write(pixels_of(batch.images, self._preprocessing).numpy().tobytes())
            kept.append(_Kept(tuple(batch.images.shape), batch.labels, batch.keys))
            yield batch
        self._kept, self.skipped = kept, list(self._batches.skipped)

    def _again(self, kept: list[_Kept]) -> Iterator[Batch]:
        self._file.seek(0)
        for one in kept:
            size = torch.Size(one.shape).numel()
            data = bytearray(self._file.read(size))
            images = self._normalize(torch.frombuffer(data, dtype=torch.uint8).view(one.shape))
            yield Batch(images, one.labels, one.keys)


@dataclass(frozen=True)
class _Kept:
    """A batch without its pixels."""

    shape: tuple[int, ...]
    labels: Tensor | None
    keys: tuple[str, ...]


@contextmanager
def decoded_once(batches: Batches, preprocessing: Preprocessing) -> Iterator[DecodedBatches]:
    """Batches to iterate over several times, of which the files are read and decoded the first time only.

    Args:
        batches: From :func:`~cpvit.data.loader.make_loader`.
        preprocessing: The loader's.

    Raises:
        OSError: While iterating, if the disk is full; TMPDIR names another.

    Example:
        >>> with decoded_once(batches, preprocessing) as again:  # doctest: +SKIP
        ...     first, second = list(again), list(again)
    """
    with tempfile.TemporaryFile(prefix="cpvit-pixels-") as file:
        yield DecodedBatches(batches, preprocessing, file)
