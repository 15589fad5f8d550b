"""Accuracy against cost: from the record of a sweep, or made on the demo's digits. The report's chart shows it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from cpvit.adapters import Host
from cpvit.app.examples import digits_source
from cpvit.app.turns import Turns
from cpvit.data import Preprocessing, make_loader
from cpvit.measure.sweep import SweepOptions, sweep
from cpvit.pictures.curve import COLOURS
from cpvit.report import load_record, read_record
from cpvit.report.accuracy import Panel, panels
from cpvit.report.charts import accuracy_chart

T = TypeVar("T")

DIGITS_SWEEP = SweepOptions(methods=("cpvit-merge", "tome", "pitome", "cpvit"), macs=(0.8, 0.6, 0.4))
DIGITS = 160
BATCH = 16
GREY = "#808080"
"""Of axes and letters: seen on white and on black."""


def read_panel(path: Path) -> Panel:
    """The record that ``cpvit sweep --json`` wrote.

    Raises:
        ValueError: The file cannot be read, or is something else; the message names it.
    """
    record = load_record(path)
    if record.kind != "sweep":
        raise ValueError(
            f"{path} is the record of another command ({record.kind}); give what cpvit sweep --json FILE writes"
        )
    found = panels([record])
    if not found:
        raise ValueError(f"{path} has no points; give the record of a sweep over methods and budgets")
    return found[0]


def digits_panel(
    dense: Host,
    preprocessing: Preprocessing,
    turns: Turns,
    on_progress: Callable[[float, str], None],
    *,
    images: int = DIGITS,
    options: SweepOptions = DIGITS_SWEEP,
) -> Panel:
    """Sweep over the demo's digits on a copy of the packaged model; others have their turn between two batches.

    Args:
        dense: The packaged model; left as it is.
        preprocessing: Of its images.
        turns: Who computes when.
        on_progress: Called with the share done, 0 to 1, and what is done.
        images: How many.
        options: Methods and budgets.
    """
    labels = {str(digit): digit for digit in range(10)}
    batches = make_loader(digits_source(images), preprocessing, labels=labels, batch_size=BATCH)
    passes = 1 + len(options.methods) * len(options.macs)
    done = 0

    def progress(items: Iterable[T], title: str, total: int) -> Iterable[T]:
        nonlocal done
        on_progress(done / passes, title)
        done += 1
        return turns.shared(items)

    result = sweep(dense.copy_sharing_weights().model, batches, options, progress=progress)
    named = dataclasses.replace(result, model="the packaged digit model")
    record = read_record(json.dumps(dataclasses.asdict(named), default=str), "the demo's digits")
    return panels([record])[0]


def chart(panel: Panel) -> dict[str, Any]:
    """The report's chart as Vega-Lite, with colours that are seen in light and dark."""
    letters = {"labelColor": GREY, "titleColor": GREY}
    return accuracy_chart(panel) | {
        # Vega's menu has a link that sends the chart to an editor on another machine.
        "usermeta": {"embedOptions": {"actions": False}},
        "config": {
            "background": "transparent",
            "view": {"stroke": GREY},
            "axis": letters | {"gridColor": GREY, "gridOpacity": 0.3, "domainColor": GREY, "tickColor": GREY},
            "legend": letters | {"columns": 2},
            "mark": {"color": GREY},
            "rule": {"color": GREY},
            "text": {"color": GREY},
            "range": {"category": list(COLOURS)},
        },
    }
