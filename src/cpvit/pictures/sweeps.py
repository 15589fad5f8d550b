"""Draw a sweep."""

from __future__ import annotations

from pathlib import Path

from cpvit.measure.sweep import SweepResult
from cpvit.pictures.curve import CurvePoint, draw_curve


def plot_sweep(result: SweepResult, path: Path) -> Path:
    """Top-1 and KL against MACs, a line per method."""
    lines: dict[str, list[CurvePoint]] = {}
    for point in result.points:
        lines.setdefault(point.method, []).append(CurvePoint(point.macs_ratio, point.top1, point.kl))
    title = f"{result.model}, {result.images} images"
    return draw_curve(lines, path, title=title, dense_top1=result.dense_top1)
