"""Single images: those that dense and pruned classify differently, and what became of the patches of some."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpvit.pictures import paint_block, stages
from cpvit.report.fields import Fields, ReportError
from cpvit.report.records import Record

if TYPE_CHECKING:
    from PIL.Image import Image

STAGES = 6
"""Blocks shown of each image, at most."""
LISTED = 24
"""Images of one record on which pruned models differ, at most."""
USUAL_MACS = 0.6
"""What is shown first where there are several budgets."""
MOST_PIXELS = 512 * 512
_SIDE = 224
_QUALITY = 72


@dataclass(frozen=True)
class Other:
    """Another answer than the dense model's."""

    model: str
    """Method and MACs."""
    answer: str
    right: bool


@dataclass(frozen=True)
class Case:
    """One image that at least one pruned model classifies differently."""

    image: str
    picture: str | None
    """A data URL."""
    label: str
    dense: str
    dense_right: bool
    others: tuple[Other, ...]


@dataclass(frozen=True)
class Lost:
    """What the pruned models of one record classify differently."""

    source: str
    cases: tuple[Case, ...]
    counts: tuple[tuple[str, int, int], ...]
    """Pruned model, how many images it classifies differently, of how many."""


@dataclass(frozen=True)
class Step:
    """One image as it leaves one block."""

    caption: str
    picture: str
    """A data URL."""


@dataclass(frozen=True)
class Strip:
    """One image through the blocks."""

    image: str
    label: str
    dense: str
    pruned: str
    same: bool
    original: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Traced:
    """The gallery under one pruned model."""

    title: str
    strips: tuple[Strip, ...]


@dataclass(frozen=True)
class _Model:
    """A pruned model of a record, and the pictures it shares with the others of it."""

    title: str
    macs: float
    values: Fields
    record: Fields


def lost(records: Sequence[Record]) -> tuple[Lost, ...]:
    """Of every record with images that at least one pruned model classifies differently."""
    found = []
    for record in records:
        models = [model for model in _models([record]) if model.values.values.get("disagreements")]
        if models:
            counts = tuple(_differing(model) for model in models)
            found.append(Lost(record.source, _cases(models)[:LISTED], counts))
    return tuple(found)


def galleries(records: Sequence[Record]) -> Iterator[Traced]:
    """Of every pruned model whose patches were followed, painted one by one; the middle of the budgets first."""
    models = [
        model
        for model in _models(records)
        if "examples" in model.record and model.values.values.get("traces")
    ]
    for model in sorted(models, key=lambda model: round(abs(model.macs - USUAL_MACS), 2)):
        yield Traced(f"{model.title} of the MACs", tuple(_strips(model)))


def _models(records: Sequence[Record]) -> Iterator[_Model]:
    for record in records:
        fields = record.fields
        if record.kind == "sweep":
            for point in fields.children("points"):
                yield _model(point.text("method"), point, fields)
        elif record.kind == "eval":
            yield _model(fields.child("plan").text("method"), fields, fields)


def _model(method: str, values: Fields, record: Fields) -> _Model:
    macs = values.number("macs_ratio")
    return _Model(f"{method} at {100 * macs:.1f}%", macs, values, record)


def _differing(model: _Model) -> tuple[str, int, int]:
    images = model.record.count("images")
    return model.title, round((1 - model.values.number("agreement")) * images), images


def _cases(models: Sequence[_Model]) -> tuple[Case, ...]:
    """By image, those first that most models differ on; with a picture before those without."""
    pictures = _pictures(models[0].record)
    found: dict[str, list[tuple[str, Fields]]] = {}
    for model in models:
        for one in model.values.children("disagreements"):
            found.setdefault(one.text("image"), []).append((model.title, one))
    cases = [_case(name, answers, pictures) for name, answers in found.items()]
    return tuple(sorted(cases, key=lambda case: (case.picture is None, -len(case.others))))


def _case(name: str, answers: Sequence[tuple[str, Fields]], pictures: dict[str, str]) -> Case:
    first = answers[0][1]
    label = first.count("label") if "label" in first else None
    dense = first.child("dense")
    others = [(title, fields.child("pruned")) for title, fields in answers]
    return Case(
        image=name,
        picture=_url(pictures[name], "jpeg") if name in pictures else None,
        label="" if label is None else _class(label, first.values.get("label_name")),
        dense=_answer(dense),
        dense_right=dense.count("index") == label,
        others=tuple(Other(title, _answer(one), one.count("index") == label) for title, one in others),
    )


def _strips(model: _Model) -> Iterator[Strip]:
    examples = model.record.child("examples")
    rows, columns = examples.counts("grid")
    pictures = _pictures(model.record)
    shown = {one.text("image"): one for one in examples.children("gallery")}
    for trace in model.values.children("traces"):
        name = trace.text("image")
        if name not in shown or name not in pictures:
            continue
        pixels = _pixels(pictures[name], examples.place, (rows, columns))
        tokens = [_tokens(text, rows * columns, trace.place) for text in trace.texts("blocks")]
        dense, pruned = shown[name].child("answer"), trace.child("answer")
        label = shown[name].values.get("label")
        yield Strip(
            image=name,
            label="" if label is None else _class(label, shown[name].values.get("label_name")),
            dense=_answer(dense),
            pruned=_answer(pruned),
            same=dense.count("index") == pruned.count("index"),
            original=_url(pictures[name], "jpeg"),
            steps=tuple(_steps(pixels, tokens, (rows, columns))),
        )


def _steps(pixels: Tensor, tokens: Sequence[Tensor], grid: tuple[int, int]) -> Iterator[Step]:
    counts = [int(one.max()) + 1 for one in tokens]
    patches = grid[0] * grid[1]
    for block in stages(counts, patches, limit=STAGES):
        removed = bool((tokens[block] < 0).any())
        positions = torch.arange(counts[block])
        carrier: Tensor | None = tokens[block]
        if removed:
            positions, carrier = (tokens[block] >= 0).nonzero().flatten(), None
        painted = paint_block(pixels, positions, carrier, grid, min_side=_SIDE)
        painted.thumbnail((_SIDE, _SIDE))
        caption = f"after block {block + 1}: {counts[block]} of {patches}"
        yield Step(caption, _webp(painted))


def _tokens(text: str, patches: int, place: str) -> Tensor:
    """The token of every patch: [patches]."""
    try:
        values = [int(word) for word in text.split()]
    except ValueError:
        values = []
    if len(values) != patches or not all(-1 <= value < patches for value in values):
        raise ReportError(f"{place}: blocks must hold {patches} numbers from -1 to {patches - 1} each")
    return torch.tensor(values)


def _pictures(record: Fields) -> dict[str, str]:
    """JPEGs in base64, by the name of the image."""
    if "examples" not in record:
        return {}
    pictures = record.child("examples").child("pictures")
    return {name: pictures.text(name) for name in pictures.values}


def _pixels(encoded: str, place: str, grid: tuple[int, int]) -> Tensor:
    """A picture as [3 H W], of a size that divides into the grid."""
    picture = _decoded(encoded, place)
    cell = max(1, round(max(picture.size) / max(grid)))
    picture = picture.resize((cell * grid[1], cell * grid[0]))
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255


def _decoded(encoded: str, place: str) -> Image:
    """Only what a record holds: a small JPEG."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["JPEG"])
        if picture.width * picture.height > MOST_PIXELS:
            raise ReportError(f"{place}: a picture has {picture.width}x{picture.height} pixels, too many")
        return picture.convert("RGB")
    except (binascii.Error, UnidentifiedImageError, OSError, ValueError) as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"{place}: a picture is no JPEG in base64 ({error})") from None


def _webp(picture: Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=_QUALITY, method=4)
    return _url(base64.b64encode(stream.getvalue()).decode(), "webp")


def _url(encoded: str, kind: str) -> str:
    return f"data:image/{kind};base64,{encoded}"


def _answer(fields: Fields) -> str:
    return f"{_class(fields.count('index'), fields.values.get('name'))} ({100 * fields.number('probability'):.1f}%)"


def _class(index: int, name: object) -> str:
    return f"class {index}" if name is None else str(name).split(",")[0]
