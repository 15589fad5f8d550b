"""The demo's digits as pictures: examples to look at, and labelled images for a curve. Nothing is read from files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from cpvit.data import ImageSource
from cpvit.data.records import make_source
from cpvit.demo.digits import cluttered_digits, to_unit

EXAMPLES = 8


@dataclass(frozen=True)
class Example:
    """A picture and what it shows."""

    title: str
    picture: Image.Image


def examples(count: int = EXAMPLES, seed: int = 0) -> tuple[Example, ...]:
    """Digits that the packaged model never saw; the same arguments always give the same."""
    images, labels = cluttered_digits("test", count=count, seed=seed)
    return tuple(
        Example(f"digit {label}", _picture(image))
        for image, label in zip(images, labels.tolist(), strict=True)
    )


def digits_source(count: int, seed: int = 0) -> ImageSource:
    """The same as a source of labelled images."""
    found = {f"{number:04d}": example for number, example in enumerate(examples(count, seed))}
    reader = _Pictures({key: example.picture for key, example in found.items()})
    labels = [example.title.split()[-1] for example in found.values()]
    return make_source("the demo's digits", list(found), labels, reader, split="test")


@dataclass(frozen=True)
class _Pictures:
    pictures: dict[str, Image.Image]

    def read(self, key: str) -> Image.Image:
        return self.pictures[key]

    def select(self, keys: Iterable[str]) -> _Pictures:
        return _Pictures({key: self.pictures[key] for key in keys})


def _picture(image: Tensor) -> Image.Image:
    """Normalised [3 H W] as a picture."""
    return Image.fromarray((255 * to_unit(image)).round().byte().permute(1, 2, 0).numpy())
