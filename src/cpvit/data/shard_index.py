"""Shards as images that can be read in any order: where each image lies, what it is called, which class it has.

The headers of all shards are read once. What is found is kept in arrays and bytes, about 40 bytes and the
name per image (ImageNet: 80 MB), and not as objects: loader workers are forked, and an object that is merely
looked at is copied into each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from cpvit.data.archives import Extent, errors_named, read_extent
from cpvit.data.images import decode
from cpvit.data.order import Numbers
from cpvit.data.records import ImageSource, Sample
from cpvit.data.shard_files import class_of, walk_samples

_UNLABELLED = -1

_Columns = tuple[Numbers, bytes, Numbers, npt.NDArray[np.int32]]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The images of S shards laid end to end, N in all; a "place" is an index into that row.

    Attributes:
        shards: The files.
        starts: Place of the first image of each shard, and N, `[S + 1]`.
        offsets: Of the image in its shard, in bytes, `[N]`.
        lengths: Of the image, in bytes, `[N]`.
        names: For each shard the names of its images, each followed by a NUL, after a first NUL.
        name_starts: Where in that the name of an image begins, `[N]`.
        classes: Names of classes.
        codes: Index into `classes`, or -1 for an image without a label, `[N]`.
    """

    shards: tuple[Path, ...]
    starts: Numbers
    offsets: Numbers
    lengths: Numbers
    names: tuple[bytes, ...]
    name_starts: Numbers
    classes: tuple[str, ...]
    codes: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.codes)

    def sample(self, place: int) -> Sample:
        """Key and class of an image."""
        shard = int(np.searchsorted(self.starts, place, "right")) - 1
        start = int(self.name_starts[place])
        name = self.names[shard][start : self.names[shard].index(b"\0", start)]
        return Sample(f"{self.shards[shard]}:{_decoded(name)}", self.class_name(place))

    def class_name(self, place: int) -> str | None:
        """The class of an image, if it has one."""
        code = self.codes[place]
        return None if code == _UNLABELLED else self.classes[code]

    def find(self, key: str) -> tuple[Path, str, Extent]:
        """The shard that the key of an image names, the name in there, and the place of its bytes."""
        for at, character in enumerate(key):
            shard = self._numbers.get(key[:at]) if character == ":" else None
            if shard is None:
                continue
            before = self.names[shard].find(b"\0" + _encoded(key[at + 1 :]) + b"\0")
            if before >= 0:
                place = self.starts[shard] + self.names[shard].count(b"\0", 0, before)
                extent = (int(self.offsets[place]), int(self.lengths[place]))
                return self.shards[shard], key[at + 1 :], extent
        raise KeyError(key)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {str(shard): number for number, shard in enumerate(self.shards)}


class ShardSamples(Sequence[Sample]):
    """The samples at some places of an index, each made when it is asked for."""

    def __init__(self, stored: ShardIndex, places: Numbers) -> None:
        self.stored = stored
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, position: int) -> Sample: ...
    @overload
    def __getitem__(self, position: slice) -> ShardSamples: ...
    def __getitem__(self, position: int | slice) -> Sample | ShardSamples:
        if isinstance(position, slice):
            return ShardSamples(self.stored, self.places[position])
        return self.stored.sample(int(self.places[position]))


@dataclass(frozen=True)
class ShardReader:
    """Random access to shards; a file is open only while an image is read from it."""

    index: ShardIndex

    def read(self, key: str) -> Image.Image:
        """The RGB image of `key`."""
        shard, _, extent = self.index.find(key)
        with errors_named(shard), shard.open("rb") as stream:
            data = read_extent(stream, extent)
        return decode(data, key)

    def select(self, keys: Iterable[str]) -> ShardReader:
        """Itself: the index is small, and workers share it."""
        return self


@dataclass(frozen=True)
class ShardSource(ImageSource):
    """Images in shards, in the order in which they are stored. Their classes are the labels they hold."""

    samples: ShardSamples

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files, in order."""
        return self.samples.stored.shards

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many of the images each of the shards holds."""
        places = np.searchsorted(self.samples.places, self.samples.stored.starts)
        return tuple(np.diff(places).tolist())

    @property
    def is_part(self) -> bool:
        """Whether images of these shards have been left out."""
        return len(self) < len(self.samples.stored)

    @property
    def class_names(self) -> list[str | None]:
        """The class of each image."""
        index = self.samples.stored
        codes = index.codes[self.samples.places].tolist()
        return [None if code == _UNLABELLED else index.classes[code] for code in codes]

    def label_problem(self, sample: Sample, labels: Mapping[str, int]) -> str:
        """Why an image has no label among `labels`; its shard is read again for that."""
        shard, name, _ = self.samples.stored.find(sample.key)
        with errors_named(shard), shard.open("rb") as stream:
            files = next(files for files in walk_samples(stream, shard) if files.image[0] == name)
            try:
                found = class_of(stream, shard, files)
            except ValueError as error:
                return str(error)
        names = sorted(labels, key=labels.__getitem__)
        shown = f"{names[0]} to {names[-1]}" if len(names) > 1 else ", ".join(names)
        return (
            f"{shard}:{files.label[0] if files.label else name} has label {found!r}; expected one of the "
            f"{len(names)} classes {shown}: use a model of these classes, or write the shards anew with the "
            "right labels"
        )

    def _part(self, positions: Sequence[int]) -> ShardSource:
        places = self.samples.places[np.sort(np.array(positions, np.int64))]
        return replace(self, samples=ShardSamples(self.samples.stored, places))


def index_shards(shards: Sequence[Path]) -> ShardIndex:
    """Read the headers and the labels of all shards.

    Raises:
        BadArchiveError: A shard is truncated, damaged or no tar.
        ValueError: A shard is compressed, or a sample has no image, or two.
    """
    classes: dict[str, int] = {}
    columns = [_columns(shard, classes) for shard in shards]
    extents, names, name_starts, codes = zip(*columns, strict=True)
    offsets, lengths = np.concatenate(extents).T.copy()
    return ShardIndex(
        shards=tuple(shards),
        starts=np.cumsum([0, *map(len, codes)]),
        offsets=offsets,
        lengths=lengths,
        names=names,
        name_starts=np.concatenate(name_starts),
        classes=tuple(classes),
        codes=np.concatenate(codes),
    )


def _columns(shard: Path, classes: dict[str, int]) -> _Columns:
    """What one shard adds to `extents` `[n 2]`, `names`, `name_starts` `[n]` and `codes` `[n]`; and to `classes`."""
    extents, names, codes = [], [], []
    with errors_named(shard), shard.open("rb") as stream:
        for files in walk_samples(stream, shard):
            name, extent = files.image
            names.append(_encoded(name) + b"\0")
            extents.append(extent)
            try:
                codes.append(classes.setdefault(class_of(stream, shard, files), len(classes)))
            except ValueError:
                # An error only for who needs labels: see `label_problem`.
                codes.append(_UNLABELLED)
    name_starts = np.cumsum([1, *map(len, names)])[:-1]
    places = np.array(extents, np.int64).reshape(-1, 2)
    return places, b"\0" + b"".join(names), name_starts, np.array(codes, np.int32)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
