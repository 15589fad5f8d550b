"""Finetuning runs as curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpvit.report.fields import Fields
from cpvit.report.records import Record

MOST_STEPS = 400
"""Points of a curve; of longer runs means over so many pieces."""


@dataclass(frozen=True)
class Run:
    """One finetuning run."""

    name: str
    loss: tuple[tuple[int, float], ...]
    """Step and training loss."""
    rate: tuple[tuple[int, float], ...]
    """Step and learning rate."""
    top1: tuple[tuple[int, float, float], ...]
    """Step, top-1 and loss of each evaluation."""
    seconds: float
    images_per_s: float


def runs(records: Sequence[Record]) -> tuple[Run, ...]:
    """The finetuning runs among these records."""
    return tuple(_run(record) for record in records if record.kind == "finetune")


def _run(record: Record) -> Run:
    fields = record.fields
    history = fields.child("history")
    return Run(
        name=f"{_what(fields)} ({record.source})",
        loss=thinned(history.series("loss")),
        rate=thinned(history.series("learning_rate")),
        top1=tuple(
            (one.count("step"), one.percent("top1"), one.number("loss"))
            for one in fields.children("evaluations")
        ),
        seconds=fields.number("seconds"),
        images_per_s=fields.number("images_per_s"),
    )


def _what(fields: Fields) -> str:
    if "plan" not in fields:
        return f"{fields.text('model')}, dense"
    plan = fields.child("plan")
    return f"{fields.text('model')}, {plan.text('method')} at {100 * plan.number('macs_ratio'):.1f}%"


def thinned(values: Sequence[float | None]) -> tuple[tuple[int, float], ...]:
    """Step (from 1) and value, at most 400 of them: means over pieces of equal length."""
    piece = -(-len(values) // MOST_STEPS) or 1
    found: list[tuple[int, float]] = []
    for start in range(0, len(values), piece):
        known = [value for value in values[start : start + piece] if value is not None]
        if known:
            found.append((min(start + piece, len(values)), sum(known) / len(known)))
    return tuple(found)
