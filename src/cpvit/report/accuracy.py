"""Accuracy against cost: all points on the same images, their error bars and their front."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cpvit.report.fields import Fields
from cpvit.report.plans import PlanCurve, plan_curve
from cpvit.report.records import Record

SAME_MACS = 0.003
"""Fractions of the dense MACs that differ by less are the same budget."""
Z = 1.96
"""Of a 95% interval."""


@dataclass(frozen=True)
class Point:
    """One model on a set of images."""

    method: str
    """ "dense", a method, or what was exported."""
    macs: float
    """Fraction of the dense MACs."""
    top1: float
    top5: float
    low: float
    """Of the 95% interval of top-1 that so many images allow."""
    high: float
    kl: float | None
    agreement: float | None
    note: str
    """Schedule, or runtime and precision."""
    on_front: bool = False
    """No other point is as good for fewer MACs."""

    @property
    def title(self) -> str:
        """Its name where several are listed."""
        return "dense" if self.method == "dense" else f"{self.method} at {100 * self.macs:.1f}%"


@dataclass(frozen=True)
class Panel:
    """All points on the same images."""

    model: str
    images: int
    points: tuple[Point, ...]

    @property
    def dense(self) -> Point | None:
        """The dense model, if it was evaluated."""
        return next((point for point in self.points if point.method == "dense"), None)


def panels(records: Sequence[Record]) -> tuple[Panel, ...]:
    """The points of these records, by model, number of images and the dense model's accuracy."""
    found: dict[tuple[str, int, float | None], list[Point]] = {}
    for record in records:
        for model, images, dense, points in _points(record):
            line = found.setdefault((model, images, None if dense is None else round(dense.top1, 6)), [])
            line += [point for point in ([dense] if dense is not None else []) if point not in line] + points
    return tuple(Panel(model, images, with_front(points)) for (model, images, _), points in found.items())


def curves(records: Sequence[Record]) -> tuple[PlanCurve, ...]:
    """The plans of these records that differ."""
    found = [curve for record in records for curve in _plans(record)]
    return tuple({(curve.title, curve.tokens, curve.heads): curve for curve in found}.values())


def with_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points, those on the Pareto front marked: nothing is both cheaper and at least as accurate."""
    return tuple(
        dataclasses.replace(point, on_front=not any(_beats(other, point) for other in points))
        for point in points
    )


def _beats(other: Point, point: Point) -> bool:
    """Budgets are met to a tenth of a percent or two; that is no difference."""
    no_worse = other.macs <= point.macs + SAME_MACS and other.top1 >= point.top1
    return no_worse and (other.macs < point.macs - SAME_MACS or other.top1 > point.top1)


def wilson(percent: float, images: int) -> tuple[float, float]:
    """The 95% interval of a share of so many images, in percent (Wilson 1927)."""
    if images < 1:
        return 0.0, 100.0
    share, square = percent / 100, Z * Z / images
    centre = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / images + square / (4 * images)) / (1 + square)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def _points(record: Record) -> Iterator[tuple[str, int, Point | None, list[Point]]]:
    fields = record.fields
    if record.kind == "sweep":
        images = fields.count("images")
        dense = _dense(fields.percent("dense_top1"), fields.percent("dense_top5"), images)
        points = [
            _point(one, one.text("method"), one.text("schedule"), images) for one in fields.children("points")
        ]
        yield fields.text("model"), images, dense, points
    elif record.kind == "eval":
        images, side, pruned = fields.count("images"), fields.child("dense"), fields.child("pruned")
        dense = _dense(side.percent("top1"), side.percent("top5"), images)
        plan = fields.child("plan")
        values = {**fields.values, "top1": pruned.percent("top1"), "top5": pruned.percent("top5")}
        name = plan.text("method") + (" in two stages" if "escalation" in fields else "")
        point = _point(Fields(values, fields.place), name, plan.text("schedule"), images)
        yield fields.text("model"), images, dense, [point]
    elif record.kind == "saved eval":
        images, pruned, plan = fields.count("images"), fields.child("pruned"), fields.child("plan")
        values = {**pruned.values, "macs_ratio": plan.number("macs_ratio")}
        point = _point(Fields(values, pruned.place), plan.text("method"), plan.text("schedule"), images)
        yield fields.text("model"), images, None, [point]
    elif record.kind == "exported eval":
        yield _exported(fields)


def _exported(fields: Fields) -> tuple[str, int, Point | None, list[Point]]:
    described, images = fields.child("description"), fields.count("images")
    plan = described.child("plan") if "plan" in described else None
    found = {"macs_ratio": 1.0 if plan is None else plan.number("macs_ratio")}
    dense = None
    if "dense" in fields:
        side = fields.child("dense")
        dense = _dense(side.percent("top1"), side.percent("top5"), images)
        found |= {"kl": side.number("kl"), "agreement": side.number("agreement")}
    note = f"{described.text('format')}, {described.text('precision')}"
    name = f"{'dense model' if plan is None else plan.text('method')}, {note}"
    point = _point(Fields({**fields.values, **found}, fields.place), name, note, images)
    return described.text("model"), images, dense, [point]


def _dense(top1: float, top5: float, images: int) -> Point:
    return Point("dense", 1.0, top1, top5, *wilson(top1, images), None, None, "")


def _point(fields: Fields, method: str, note: str, images: int) -> Point:
    top1 = fields.percent("top1")
    return Point(
        method=method,
        macs=fields.number("macs_ratio"),
        top1=top1,
        top5=fields.percent("top5"),
        low=wilson(top1, images)[0],
        high=wilson(top1, images)[1],
        kl=fields.number("kl") if "kl" in fields else None,
        agreement=fields.number("agreement") if "agreement" in fields else None,
        note=note,
    )


def _plans(record: Record) -> Iterator[PlanCurve]:
    fields = record.fields
    if record.kind == "plan":
        yield plan_curve(fields)
    elif record.kind == "sweep":
        for point in fields.children("points"):
            yield plan_curve(point.child("plan"), point.text("method"))
    elif record.kind in ("pair", "escalation"):
        yield from _pair(fields if record.kind == "pair" else fields.child("found"))
    else:
        for holder in _holders(record):
            if "plan" in holder:
                yield plan_curve(holder.child("plan"))


def _pair(fields: Fields) -> Iterator[PlanCurve]:
    if "light" not in fields:  # one plan alone was cheaper
        yield plan_curve(fields)
        return
    yield plan_curve(fields.child("light"))
    if "second" in fields:
        yield plan_curve(fields.child("second"))


def _holders(record: Record) -> list[Fields]:
    """What has a plan in this record."""
    fields = record.fields
    if record.kind in ("comparison", "runtimes"):
        return list(fields.children("rows"))
    if record.kind == "benchmarks":
        return [row for setting in fields.children("settings") for row in setting.children("rows")]
    if record.kind in ("exported eval", "export"):
        return [fields.child("description")]
    return [fields.child("tuned") if record.kind == "timed search" else fields]
