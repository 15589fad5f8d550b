"""What a hurried reader takes away: a few numbers, each with what it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cpvit.report.accuracy import Panel, panels
from cpvit.report.records import Record
from cpvit.report.speed import speeds
from cpvit.report.training import runs

ALLOWED = 1.0
"""Points of top-1 that a sweep's headline allows to be lost."""
MOST = 6


@dataclass(frozen=True)
class Headline:
    """One number."""

    value: str
    what: str


def headlines(records: Sequence[Record]) -> tuple[Headline, ...]:
    """At most six, accuracy first."""
    found = [line for panel in panels(records) for line in _of_panel(panel)]
    found += _of_speeds(records)
    for run in runs(records):
        if run.top1:
            found.append(Headline(f"{max(point[1] for point in run.top1):.2f}%", f"best top-1 of {run.name}"))
    return tuple(found[:MOST])


def _of_panel(panel: Panel) -> Iterator[Headline]:
    dense = panel.dense
    pruned = [point for point in panel.points if point.method != "dense"]
    if dense is None or not pruned:
        for point in pruned[:1]:
            yield Headline(f"{point.top1:.2f}%", f"top-1 of {point.title} of the MACs")
        return
    close = [point for point in pruned if dense.top1 - point.top1 <= ALLOWED]
    chosen = min(close, key=lambda point: point.macs) if close else max(pruned, key=lambda point: point.top1)
    lead = "cheapest within a point of dense: " if len(pruned) > 1 and close else ""
    yield Headline(f"{100 * chosen.macs:.1f}%", f"of the dense MACs; {lead}{chosen.method}")
    change = chosen.top1 - dense.top1
    yield Headline(
        f"{chosen.top1:.2f}%",
        f"top-1 then ({change:+.2f} points; dense {dense.top1:.2f}%, {panel.images} images)",
    )
    if chosen.agreement is not None:
        yield Headline(f"{100 * chosen.agreement:.1f}%", "of the images get the dense model's answer")


def _of_speeds(records: Sequence[Record]) -> Iterator[Headline]:
    timed = [row for row in speeds(records) if row.macs < 1]
    if timed:
        best = max(timed, key=lambda row: row.speedup[0])
        median, low, high = best.speedup
        yield Headline(
            f"{median:.2f}×", f"as fast as dense: {best.name} (rounds from {low:.2f}× to {high:.2f}×)"
        )
        yield Headline(f"{best.efficiency:.2f}", "speed-up times MACs: 1 if the clock follows the count")
