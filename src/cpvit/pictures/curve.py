"""Draw accuracy against MACs, a line for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cpvit.files import replacing

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0579a", "#c98a00", "#3a9bd1", "#767676", "#8c564b")
"""After Okabe and Ito: told apart by people who do not see red or green."""
MARKERS = "os^Dv<>p"


class CurvePoint(NamedTuple):
    """One pruned model."""

    macs: float
    """Fraction of the dense MACs."""
    top1: float
    """Percent."""
    kl: float
    """Nats from the dense model."""


def draw_curve(
    lines: Mapping[str, Sequence[CurvePoint]],
    path: Path,
    *,
    title: str,
    dense_top1: float,
) -> Path:
    """Write a picture (PNG, SVG or PDF by its name) of top-1 and KL against MACs.

    Args:
        lines: The points of each method, in any order.
        path: The file to write.
        title: Above the picture, such as the model and the number of images.
        dense_top1: Of the dense model, in percent; drawn as a dashed line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, divergence = figure.subplots(1, 2)
    for number, (method, points) in enumerate(lines.items()):
        ordered = sorted(points)
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 5.5,
            "label": method,
            "zorder": 10 - number,  # the first one is the subject
        }
        ratios = [100 * point.macs for point in ordered]
        accuracy.plot(ratios, [point.top1 for point in ordered], **style)
        divergence.plot(ratios, [point.kl for point in ordered], **style)
    accuracy.axhline(dense_top1, color="#444444", linestyle="--", linewidth=1)
    accuracy.annotate(
        f"dense {dense_top1:.2f}%",
        (0, dense_top1),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=9,
        color="#444444",
    )
    accuracy.set(xlabel="MACs (% of dense)", ylabel="top-1 accuracy (%)")
    divergence.set(xlabel="MACs (% of dense)", ylabel="KL from dense (nats)", yscale="log")
    for axes in (accuracy, divergence):
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    divergence.legend(frameon=False, loc="best")
    figure.suptitle(title, fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=140)
    return path
