"""The two pictures at the top of the README: what happens to one image, and accuracy against MACs.

    python studies/readme_pictures.py --checkpoint deit_tiny_patch16_224.safetensors --sweep records/sweep.json

The photograph is scikit-learn's ``china.jpg`` by Daniel Büchele, CC BY 2.0
(https://www.flickr.com/photos/danielbuechele/6061409035). The curve comes from any record of ``cpvit sweep --json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo
from torch import Tensor

from cpvit import PruneConfig, prune_, unprune_
from cpvit.data import Preprocessing
from cpvit.pictures import paint_block
from cpvit.pictures.curve import CurvePoint, draw_curve
from cpvit.pruning.record import record
from cpvit.report import load_record
from cpvit.report.accuracy import panels
from cpvit.weights.loading import load_checkpoint

BLOCKS = (4, 6, 8, 10)
"""After which the image is drawn, counted from 1."""
ROWS = {"cpvit-merge": "similar patches\nmerge", "cpvit": "unimportant patches\nare removed"}
CREDIT = "photograph: Daniel Büchele,\nCC BY 2.0"


@dataclass(frozen=True)
class Row:
    """One method on the image."""

    method: str
    macs: float
    answer: str
    pictures: tuple[Image.Image, ...]
    counts: tuple[int, ...]


def main(
    checkpoint: Path, sweep: Path | None = None, out: Path = Path("docs/pictures"), macs: float = 0.6
) -> None:
    """Write tokens.png, and curve.png if there is a record.

    Args:
        checkpoint: Weights of deit_tiny_patch16_224.
        sweep: A record of ``cpvit sweep --json``.
        out: The folder to write to.
        macs: The budget of the picture, as a fraction of the dense MACs.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    load_checkpoint(model, checkpoint)
    print(draw_tokens(model, macs, out / "tokens.png"))
    if sweep is not None:
        print(draw_record(sweep, out / "curve.png"))


def draw_record(path: Path, out: Path) -> Path:
    """The curve of a sweep's record."""
    (panel,) = panels([load_record(path)])
    assert panel.dense is not None, "a sweep evaluates the dense model"
    lines: dict[str, list[CurvePoint]] = {}
    for point in panel.points:
        if point.kl is not None:
            lines.setdefault(point.method, []).append(CurvePoint(point.macs, point.top1, point.kl))
    title = f"{panel.model}, {panel.images} images, no finetuning"
    return draw_curve(lines, out, title=title, dense_top1=panel.dense.top1)


@torch.inference_mode()
def draw_tokens(model: Any, macs: float, out: Path) -> Path:
    """The photograph, and what is left of it after some blocks under each method."""
    preprocessing = Preprocessing.from_model(model)
    image = preprocessing.transform()(Image.fromarray(load_sample_image("china.jpg")))
    pixels = _unit(image, preprocessing)
    dense = _answer(model(image[None]))
    rows = [_row(model, method, macs, image, pixels) for method in ROWS]
    figure = Figure(figsize=(11.6, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 1 + len(BLOCKS), squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        _show(line[0], paint_block(pixels, torch.arange(196), None, (14, 14)), "")
        words = f"{row.method}\n{ROWS[row.method]}\n\n{100 * row.macs:.0f}% of the MACs\nanswer: {row.answer}"
        line[0].set_ylabel(words, rotation=0, ha="right", va="center", labelpad=8)
        line[0].set_title(f"dense: {dense}", fontsize=9)
        for place, picture, block, count in zip(line[1:], row.pictures, BLOCKS, row.counts, strict=True):
            _show(place, picture, f"after block {block}: {count} tokens")
    figure.text(0.003, 0.006, CREDIT, ha="left", va="bottom", fontsize=6.5, color="#666666")
    figure.savefig(out, dpi=110, facecolor="white")
    with Image.open(out) as picture:
        picture.convert("RGB").quantize(256).save(out, optimize=True)
    return out


def _row(model: Any, method: str, macs: float, image: Tensor, pixels: Tensor) -> Row:
    plan = prune_(model, PruneConfig(method=method, macs=macs))
    with record(model) as trace:
        answer = _answer(model(image[None]))
    unprune_(model)
    kept = [trace.survivors[block - 1][0] for block in BLOCKS]
    carriers = [trace.carriers[block - 1] for block in BLOCKS]
    pictures = tuple(
        paint_block(pixels, positions, None if carrier is None else carrier[0], (14, 14))
        for positions, carrier in zip(kept, carriers, strict=True)
    )
    return Row(method, plan.macs_ratio, answer, pictures, tuple(len(positions) for positions in kept))


def _unit(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (image * std + mean).clamp(0, 1)


def _answer(logits: Tensor) -> str:
    probability, index = logits.softmax(dim=1)[0].max(dim=0)
    name = ImageNetInfo().label_descriptions()[int(index)].split(",")[0]
    return f"{name} ({100 * probability.item():.0f}%)"


def _show(axes: Any, picture: Image.Image, title: str) -> None:
    axes.imshow(picture, interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9)


if __name__ == "__main__":
    tyro.cli(main)
