"""Accuracy against cost: from the record of a sweep, or made on the demo's digits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cpvit.adapters import Host
from cpvit.app.examples import digits_source
from cpvit.app.turns import Turns
from cpvit.data import Preprocessing, make_loader
from cpvit.measure.sweep import SweepOptions, sweep

T = TypeVar("T")

METHODS_SHOWN = ("cpvit-merge", "tome", "pitome", "cpvit")
BUDGETS = (0.8, 0.6, 0.4)
DIGITS = 160
BATCH = 16


@dataclass(frozen=True)
class CurvePoint:
    """A method at a budget."""

    method: str
    macs_ratio: float
    top1: float
    top1_lost: float
    """Points below the dense model."""
    agreement: float
    kl: float


@dataclass(frozen=True)
class Curve:
    """What a sweep found."""

    model: str
    images: int
    dense_top1: float
    points: tuple[CurvePoint, ...]

    def standard_error(self, point: CurvePoint) -> float:
        """Of a top-1, in points: what the choice of this many images alone explains."""
        share = point.top1 / 100
        return 100.0 * (share * (1 - share) / self.images) ** 0.5


def read_curve(path: Path) -> Curve:
    """The record that ``cpvit sweep --json`` wrote.

    Raises:
        ValueError: The file cannot be read, or is something else; the message names it.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the sweep {path}: {error}") from None
    try:
        return _curve(values)
    except (KeyError, TypeError):
        raise ValueError(
            f"{path} is not the record of a sweep: expected what cpvit sweep --json FILE writes, with points and "
            "dense_top1"
        ) from None


def _curve(values: Any) -> Curve:
    names = CurvePoint.__dataclass_fields__
    points = tuple(CurvePoint(**{name: point[name] for name in names}) for point in values["points"])
    if not points:
        raise KeyError("points")
    return Curve(values["model"], values["images"], values["dense_top1"], points)


def digits_curve(
    dense: Host, preprocessing: Preprocessing, turns: Turns, on_progress: Callable[[float, str], None]
) -> Curve:
    """Sweep over the demo's digits on a copy of the packaged model; others have their turn between two batches.

    Args:
        dense: The packaged model; left as it is.
        preprocessing: Of its images.
        turns: Who computes when.
        on_progress: Called with the share done, 0 to 1, and what is done.
    """
    labels = {str(digit): digit for digit in range(10)}
    batches = make_loader(digits_source(DIGITS), preprocessing, labels=labels, batch_size=BATCH)
    passes = 1 + len(METHODS_SHOWN) * len(BUDGETS)
    done = 0

    def progress(items: Iterable[T], title: str, total: int) -> Iterable[T]:
        nonlocal done
        on_progress(done / passes, title)
        done += 1
        return turns.shared(items)

    result = sweep(
        dense.copy_sharing_weights().model,
        batches,
        SweepOptions(METHODS_SHOWN, BUDGETS),
        progress=progress,
    )
    points = tuple(
        CurvePoint(**{name: getattr(point, name) for name in CurvePoint.__dataclass_fields__})
        for point in result.points
    )
    return Curve("the packaged digit model", result.images, result.dense_top1, points)
