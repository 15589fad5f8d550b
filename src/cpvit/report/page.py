"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from cpvit.files import write_atomically
from cpvit.pictures.curve import COLOURS
from cpvit.report import charts
from cpvit.report.accuracy import Panel, curves, panels
from cpvit.report.environment import sources
from cpvit.report.fields import Fields, ReportError
from cpvit.report.headline import headlines
from cpvit.report.images import Traced, galleries, lost
from cpvit.report.records import Record
from cpvit.report.speed import exports, failures, speeds
from cpvit.report.time_charts import speed_chart, training_chart
from cpvit.report.training import runs

MAX_BYTES = 5_000_000
"""Of the page: it is to go by mail."""
GALLERY_BYTES = 2_000_000
"""Of painted pictures."""
_STATIC_WIDTH = 640
"""Of a chart where no script runs."""


def check_requirements() -> None:
    """Raise ReportError if a package that makes the page is missing."""
    for package in ("jinja2", "vl_convert"):
        _required(package)


def write_report(records: Sequence[Record], path: Path) -> Path:
    """Write a page about these records.

    Args:
        records: From :func:`cpvit.report.load_record`; at least one.
        path: The HTML file to write. What stood there stays if anything goes wrong.

    Raises:
        ReportError: A record lacks what its kind has, a package is missing, or the page would be larger than 5 MB.
    """
    if not records:
        raise ReportError("there is no record to report on; give at least one file")
    page = render(records).encode()
    if len(page) > MAX_BYTES:
        raise ReportError(
            f"the page would have {len(page) / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:g}; give fewer records, or make "
            "them with a smaller --gallery"
        )
    write_atomically(path, page.decode())
    return path


def render(records: Sequence[Record]) -> str:
    """The page as text."""
    jinja2 = _required("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cpvit.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = _Charts()
    pictures = list(_within(galleries(records)))
    content = {
        "title": _title(records),
        "headlines": headlines(records),
        "panels": [_panel(panel, made) for panel in panels(records)],
        "plans": _plans(records, made),
        "speeds": _speeds(records, made),
        "exports": exports(records),
        "failures": failures(records),
        "training": _training(records, made),
        "lost": lost(records),
        "galleries": pictures,
        "gallery_cut": len(pictures) < sum(1 for _ in _traced_models(records)),
        "sources": sources(records),
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    content["specs"] = made.specs
    scripts = [_library(), environment.get_template("page.js").render()]
    return str(
        environment.get_template("page.html").render(
            **content,
            style=environment.get_template("page.css").render(),
            scripts=scripts,
            policy=_policy(scripts),
        )
    )


@dataclass
class _Charts:
    """Charts by the name of their place on the page."""

    specs: dict[str, charts.Spec] = field(default_factory=dict)

    def add(self, spec: charts.Spec | None, label: str) -> dict[str, str] | None:
        """Name, drawing for where no script runs, and words for who cannot see it."""
        if spec is None:
            return None
        name = f"chart-{len(self.specs) + 1}"
        self.specs[name] = {"$schema": _schema(), **spec}
        drawing = _required("vl_convert").vegalite_to_svg(
            {**self.specs[name], "width": _STATIC_WIDTH, "config": _STATIC}
        )
        encoded = base64.b64encode(drawing.encode()).decode()
        return {"name": name, "drawing": f"data:image/svg+xml;base64,{encoded}", "label": label}


_STATIC = {"background": "white", "range": {"category": list(COLOURS)}}


def _panel(panel: Panel, made: _Charts) -> dict[str, Any]:
    images = f"{panel.model}, {panel.images} images"
    return {
        "panel": panel,
        "accuracy": made.add(charts.accuracy_chart(panel), f"Top-1 accuracy against MACs, {images}"),
        "divergence": made.add(charts.divergence_chart(panel), f"KL divergence against MACs, {images}"),
    }


def _plans(records: Sequence[Record], made: _Charts) -> dict[str, Any] | None:
    found = curves(records)
    if not found:
        return None
    heads = charts.plan_chart(found, heads=True) if any(curve.cuts_heads for curve in found) else None
    return {
        "curves": found,
        "tokens": made.add(charts.plan_chart(found), "Tokens that leave each block"),
        "heads": made.add(heads, "Heads that work in each block"),
    }


def _speeds(records: Sequence[Record], made: _Charts) -> list[dict[str, Any]]:
    rows = speeds(records)
    found = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        chart = made.add(speed_chart(own), f"Speed-up over dense, {setting}")
        found.append({"setting": setting, "rows": own, "chart": chart})
    return found


def _training(records: Sequence[Record], made: _Charts) -> dict[str, Any] | None:
    found = runs(records)
    if not found:
        return None
    labels = {"top1": "Accuracy of every evaluation", "loss": "Training loss", "rate": "Learning rate"}
    return {
        "runs": found,
        "charts": [made.add(training_chart(found, what), label) for what, label in labels.items()],
    }


def _traced_models(records: Sequence[Record]) -> Iterator[None]:
    for record in records:
        if "examples" not in record.fields:
            continue
        holders = list(record.fields.children("points")) if record.kind == "sweep" else [record.fields]
        yield from (None for holder in holders if holder.values.get("traces"))


def _within(found: Iterator[Traced]) -> Iterator[Traced]:
    """As many as fit."""
    spent = 0
    for traced in found:
        spent += sum(len(step.picture) for strip in traced.strips for step in strip.steps)
        spent += sum(len(strip.original) for strip in traced.strips)
        if spent > GALLERY_BYTES:
            return
        yield traced


def _title(records: Sequence[Record]) -> str:
    """The models, or the file that names none."""
    return ", ".join(dict.fromkeys(_model(record.fields) or record.source for record in records))


def _model(fields: Fields) -> str | None:
    if "model" in fields:
        return fields.text("model")
    inner = next(
        (name for name in ("plan", "description", "tuned", "found", "light") if name in fields), None
    )
    if inner is not None:
        return _model(fields.child(inner))
    return _model(next(fields.children("settings"), Fields({}, ""))) if "settings" in fields else None


def _library() -> str:
    """Vega, Vega-Lite and vega-embed in one script; nothing in it may end the element it stands in."""
    bundle: str = _required("vl_convert").javascript_bundle()
    return bundle.replace("</script", "<\\/script")


def _policy(scripts: Sequence[str]) -> str:
    """Only these scripts run, and nothing is fetched, whatever a record holds."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"


def _schema() -> str:
    return "https://vega.github.io/schema/vega-lite/v6.json"


def _required(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise ReportError(
            f"{package} is needed for a report and cannot be imported ({error}): pip install 'cpvit[report]'"
        ) from error
