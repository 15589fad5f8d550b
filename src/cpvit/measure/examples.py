"""Single images behind an accuracy: where dense and pruned disagree, and what became of the patches of a few.

Pictures are small JPEGs in base64, so that a record is one file. They are made only if asked for: whoever may measure
on images may not always pass them on.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpvit.adapters import Host
from cpvit.data import Batches
from cpvit.machine.processes import Processes, gathered
from cpvit.measure.metrics import Predictions
from cpvit.pruning.record import record

MOST_DISAGREEMENTS = 50
"""Listed for each pruned model."""
REMOVED = -1
_JPEG_QUALITY = 85
_RUN_AT_ONCE = 16


@dataclass(frozen=True)
class ExampleOptions:
    """What to show of single images."""

    gallery: int = 0
    """Images whose patches are followed through the blocks; their pictures go into the record."""
    pictured: int = 0
    """Images on which dense and pruned disagree whose pictures go into the record."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    """What the preprocessing subtracted, per channel ..."""
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    """... and divided by."""
    classes: tuple[str, ...] | None = None
    """Names of the classes."""
    side: int = 224
    """Pixels of a picture's longer side, at most."""


@dataclass(frozen=True)
class Answer:
    """The most probable class of one image."""

    index: int
    probability: float
    name: str | None = None


@dataclass(frozen=True)
class Disagreement:
    """One image that the pruned model classifies otherwise than the dense one."""

    image: str
    """Its name in the data."""
    label: int | None
    label_name: str | None
    dense: Answer
    pruned: Answer


@dataclass(frozen=True)
class PatchTrace:
    """What became of the patches of one image."""

    image: str
    answer: Answer
    """Of the pruned model."""
    blocks: tuple[str, ...]
    """For each block a number for every patch, row by row and separated by blanks: the token it is in, -1 if it was
    removed."""


@dataclass(frozen=True)
class GalleryImage:
    """One image of the gallery."""

    image: str
    label: int | None
    label_name: str | None
    answer: Answer
    """Of the dense model."""


@dataclass(frozen=True)
class Examples:
    """Pictures that several pruned models share."""

    grid: tuple[int, int]
    """Rows and columns of patches."""
    gallery: tuple[GalleryImage, ...]
    pictures: dict[str, str]
    """By the image's name, a JPEG in base64."""


def disagreements(
    dense: Predictions, pruned: Predictions, options: ExampleOptions | None = None
) -> tuple[Disagreement, ...]:
    """The images with another most probable class; at most 50, those first that the dense model is surest of."""
    names = None if options is None else options.classes
    differ = (dense.log_probs.argmax(dim=1) != pruned.log_probs.argmax(dim=1)).nonzero().flatten()
    sure = dense.log_probs[differ].amax(dim=1)
    rows = differ[sure.argsort(descending=True, stable=True)][:MOST_DISAGREEMENTS].tolist()
    return tuple(
        Disagreement(
            image=dense.keys[row] if dense.keys else str(row),
            label=_label(dense, row),
            label_name=_name(_label(dense, row), names),
            dense=_answer(dense.log_probs[row], names),
            pruned=_answer(pruned.log_probs[row], names),
        )
        for row in rows
    )


class Gallery:
    """The images that all pruned models of one run are shown with. Without options there are none."""

    def __init__(
        self,
        host: Host,
        dense: Predictions,
        batches: Batches,
        options: ExampleOptions | None,
        processes: Processes | None,
    ) -> None:
        self._host = host
        self._batches = batches
        self._options = ExampleOptions() if options is None else options
        self._processes = processes
        self._shown = _spread(dense, self._options)
        self._images = self._read([shown.image for shown in self._shown])

    def traces(self, host: Host) -> tuple[PatchTrace, ...]:
        """Follow the patches of the gallery's images through a pruned model."""
        items = list(self._images.items())
        parts = [items[start : start + _RUN_AT_ONCE] for start in range(0, len(items), _RUN_AT_ONCE)]
        return tuple(trace for part in parts for trace in _traces(host, dict(part), self._options.classes))

    def examples(self, found: Sequence[Sequence[Disagreement]]) -> Examples | None:
        """The pictures, those of the images that most pruned models disagree on among them; None if there are none."""
        telling = [name for name in _most_named(found, self._options.pictured) if name not in self._images]
        images = {**self._images, **self._read(telling)}
        if not images:
            return None
        pictures = {name: _jpeg(image, self._options) for name, image in images.items()}
        return Examples((self._host.grid[0], self._host.grid[1]), self._shown, pictures)

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Prepared images [3 H W], from whichever process has them."""
        return dict(gathered(list(self._batches.picked(names).items()), self._processes)) if names else {}


def _spread(dense: Predictions, options: ExampleOptions) -> tuple[GalleryImage, ...]:
    """Images spread evenly over the data."""
    total = len(dense.log_probs)
    count = min(options.gallery, total)
    rows = [(2 * step + 1) * total // (2 * count) for step in range(count)]
    return tuple(
        GalleryImage(
            image=dense.keys[row],
            label=_label(dense, row),
            label_name=_name(_label(dense, row), options.classes),
            answer=_answer(dense.log_probs[row], options.classes),
        )
        for row in rows
    )


@torch.inference_mode()
def _traces(host: Host, images: Mapping[str, Tensor], classes: Sequence[str] | None) -> Iterator[PatchTrace]:
    batch = torch.stack(list(images.values())).to(host.device, host.dtype)
    with host.in_eval_mode(), record(host.model) as trace:
        log_probs = host.output(host.model(batch)).float().log_softmax(dim=-1).cpu()
    for row, name in enumerate(images):
        blocks = [
            _token_of_patch(kept[row], None if carrier is None else carrier[row], host.num_patches)
            for kept, carrier in zip(trace.survivors, trace.carriers, strict=True)
        ]
        yield PatchTrace(name, _answer(log_probs[row], classes), tuple(blocks))


def _most_named(found: Iterable[Sequence[Disagreement]], count: int) -> list[str]:
    """Names of the images that most pruned models disagree on; of equals those that come first."""
    seen = Counter(case.image for cases in found for case in cases)
    return [name for name, _ in seen.most_common(count)]


def _token_of_patch(kept: Tensor, carrier: Tensor | None, patches: int) -> str:
    if carrier is None:
        alone = torch.full((patches,), REMOVED)
        carrier = alone.scatter(0, kept.cpu(), torch.arange(len(kept)))
    return " ".join(map(str, carrier.tolist()))


def _jpeg(image: Tensor, options: ExampleOptions) -> str:
    from PIL import Image

    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (options.mean, options.std))
    pixels = (image.float() * std + mean).clamp(0, 1)
    picture = Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy())
    picture.thumbnail((options.side, options.side))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(stream.getvalue()).decode()


def _answer(log_probs: Tensor, names: Sequence[str] | None) -> Answer:
    index = int(log_probs.argmax())
    return Answer(index, round(log_probs[index].exp().item(), 4), _name(index, names))


def _label(predictions: Predictions, row: int) -> int | None:
    return None if predictions.labels is None else int(predictions.labels[row])


def _name(index: int | None, names: Sequence[str] | None) -> str | None:
    return None if index is None or names is None or index >= len(names) else names[index]
