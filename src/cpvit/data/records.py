"""What a source of images is: named samples, their classes, and a reader that opens one of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Protocol

from PIL import Image


class Reader(Protocol):
    """Opens the images of one source. Must survive pickling, because loader workers get a copy."""

    def read(self, key: str) -> Image.Image:
        """The RGB image stored under `key`; raises BadImageError if it cannot be decoded."""
        ...

    def select(self, keys: Iterable[str]) -> Reader:
        """A reader that needs to serve only `keys`: small to send to a worker, and ready to read."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One image: its path inside the source (always with `/`) and its class folder, if it has one."""

    key: str
    class_name: str | None


@dataclass(frozen=True)
class ImageSource:
    """Images a user named.

    `classes` are all class folders of the source in sorted order, also after `limited` has left none of a
    class: labels must not depend on a sample. `split_name` is the split in use, None if there are no splits.
    """

    name: str
    classes: tuple[str, ...]
    samples: Sequence[Sample]
    reader: Reader = field(repr=False, compare=False)
    split_name: str | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def class_names(self) -> list[str | None]:
        """The class of each image."""
        return [sample.class_name for sample in self.samples]

    def limited(self, limit: int | None, seed: int = 0) -> ImageSource:
        """A random sample of `limit` images spread over the classes; everything if None or too few images.

        Class counts differ by at most one, except that a small class gives all it has. The sample depends on
        the names and the seed alone, and a smaller limit gives a subset of a larger one.
        """
        if limit is None:
            return self
        if limit < 1:
            raise ValueError(f"limit is {limit}; expected at least 1 image, or None for all {len(self)}")
        if limit >= len(self):
            return self
        return self._part(_round_robin(self.samples, seed)[:limit])

    def split(self, count: int, seed: int = 0) -> tuple[ImageSource, ImageSource]:
        """Two disjoint parts, for instance calibration and evaluation: `count` images as in `limited`, the
        rest.

        Example:
            >>> calibration, evaluation = source.split(256)  # doctest: +SKIP
        """
        if not 0 < count < len(self):
            raise ValueError(
                f"cannot take {count} of the {len(self)} images of {self.name} and leave a rest; "
                f"give a count between 1 and {len(self) - 1}"
            )
        order = _round_robin(self.samples, seed)
        return self._part(order[:count]), self._part(order[count:])

    def _part(self, positions: Sequence[int]) -> ImageSource:
        """The samples at these positions of `samples`, sorted by key."""
        return replace(self, samples=_by_key(self.samples[position] for position in positions))


def split_samples(
    samples: Iterable[Sample], count: int, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """`count` samples taken in turn from each class, and the others; both sorted by key."""
    given = tuple(samples)
    order = [given[position] for position in _round_robin(given, seed)]
    return _by_key(order[:count]), _by_key(order[count:])


def _by_key(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    return tuple(sorted(samples, key=lambda sample: sample.key))


def _round_robin(samples: Sequence[Sample], seed: int) -> list[int]:
    """Positions of all samples, one of each class per round; classes and samples within a class in seeded order."""
    keys = [sample.key for sample in samples]
    names = [sample.class_name or "" for sample in samples]
    by_class: dict[str, list[int]] = defaultdict(list)
    for position in sorted(range(len(keys)), key=keys.__getitem__):
        by_class[names[position]].append(position)
    classes = sorted(by_class)
    random.Random(seed).shuffle(classes)
    for name in classes:
        # A generator per class: adding images to one class leaves the order within the others as it was.
        random.Random(f"{seed}/{name}").shuffle(by_class[name])
    rounds = zip_longest(*(by_class[name] for name in classes))
    return [position for round_ in rounds for position in round_ if position is not None]


def make_source(
    name: str, keys: Sequence[str], classes: Sequence[str | None], reader: Reader, *, split: str | None
) -> ImageSource:
    """Pair keys with their classes, in key order."""
    samples = _by_key(Sample(key, class_name) for key, class_name in zip(keys, classes, strict=True))
    present = sorted({class_name for class_name in classes if class_name is not None})
    return ImageSource(name, tuple(present), samples, reader, split)
