"""The charts as Vega-Lite, without colours of their own: the page gives those of its theme."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from cpvit.report.accuracy import Panel, Point
from cpvit.report.plans import PlanCurve

Spec: TypeAlias = dict[str, Any]

SHAPES = [
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
    "triangle-left",
]
"""Of the methods, so that nobody depends on their colours."""
_FRONT = "Pareto front"


def accuracy_chart(panel: Panel) -> Spec:
    """Top-1 against MACs, with error bars, the dense model and the Pareto front."""
    rows = [_point_row(point) for point in panel.points]
    pruned = [row for row in rows if row["method"] != "dense"]
    front = sorted((row for row in rows if row["front"]), key=lambda row: float(row["MACs %"]))
    methods = _methods(pruned)
    y = {"field": "top-1 %", "type": "quantitative", "scale": {"zero": False}, "title": "top-1 accuracy (%)"}
    x = _macs_axis()
    layers: list[Spec] = [
        {
            "data": {"values": front},
            "mark": {"type": "line", "interpolate": "step-after", "strokeDash": [2, 3], "opacity": 0.75},
            "encoding": {"x": x, "y": y, "order": {"field": "MACs %"}},
        },
        *(_error_bars(method, methods, x, y) for method in methods),
        {
            "params": [_ONLY],
            "mark": "line",
            "encoding": {"x": x, "y": y, "color": _method(methods), "opacity": _faded(1)},
        },
        {
            "mark": {"type": "point", "size": 240, "strokeWidth": 1.2},
            "data": {"values": front},
            "encoding": {"x": x, "y": y, "tooltip": _tooltip(front)},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 85, "opacity": 1},
            "encoding": {
                "x": x,
                "y": y,
                "color": _method(methods),
                "shape": _shape(methods),
                "opacity": _faded(1),
                "tooltip": _tooltip(pruned),
            },
        },
    ]
    dense = [row for row in rows if row["method"] == "dense"]
    if dense:
        layers += [
            {
                "data": {"values": dense},
                "mark": {"type": "rule", "strokeDash": [6, 4], "opacity": 0.6},
                "encoding": {"y": y},
            },
            {
                "data": {"values": dense},
                "mark": {"type": "point", "shape": "diamond", "filled": True, "size": 150, "opacity": 1},
                "encoding": {"x": x, "y": y, "tooltip": _tooltip(dense)},
            },
            {
                "data": {"values": dense},
                "mark": {"type": "text", "align": "right", "baseline": "bottom", "dx": -6, "dy": -6},
                "encoding": {"x": x, "y": y, "text": {"value": "dense"}},
            },
        ]
    return chart(pruned, layers, height=360)


def divergence_chart(panel: Panel) -> Spec | None:
    """KL divergence from the dense model against MACs; None if it is not known."""
    rows = [_point_row(point) for point in panel.points if point.kl is not None and point.kl > 0]
    if not rows:
        return None
    methods = _methods(rows)
    y = {
        "field": "KL",
        "type": "quantitative",
        "scale": {"type": "log"},
        "title": "KL from dense (nats), log",
        "axis": {"tickCount": 5},
    }
    x = _macs_axis()
    return chart(
        rows,
        [
            {
                "params": [_ONLY],
                "mark": "line",
                "encoding": {"x": x, "y": y, "color": _method(methods), "opacity": _faded(1)},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 85, "opacity": 1},
                "encoding": {
                    "x": x,
                    "y": y,
                    "color": _method(methods),
                    "shape": _shape(methods),
                    "opacity": _faded(1),
                    "tooltip": _tooltip(rows),
                },
            },
        ],
        height=260,
    )


def plan_chart(curves: Sequence[PlanCurve], *, heads: bool = False) -> Spec:
    """Tokens that leave each block, or heads that work in it; a line for every plan, the hovered one in front."""
    rows = [
        {
            "block": block,
            "count": count,
            "method": curve.method,
            "plan": curve.title,
            "schedule": curve.schedule,
            "MACs %": round(100 * curve.macs, 2),
        }
        for curve in curves
        for block, count in (enumerate(curve.heads, start=1) if heads else enumerate(curve.tokens, start=0))
    ]
    methods = _methods(rows)
    title = "heads in the block" if heads else "tokens leaving the block"
    encoding = {
        "x": {
            "field": "block",
            "type": "quantitative",
            "title": "block" if heads else "block (0: what enters)",
            "axis": {"tickMinStep": 1, "format": "d"},
        },
        "y": {"field": "count", "type": "quantitative", "title": title, "axis": {"tickMinStep": 1}},
        "color": _method(methods),
        "detail": {"field": "plan"},
    }
    near = {"condition": {"param": "near", "empty": False, "value": 3.5}, "value": 1.6}
    tooltip = [{"field": name} for name in ("plan", "schedule", "block")] + [
        {"field": "count", "title": "heads" if heads else "tokens"}
    ]
    select = {
        "type": "point",
        "fields": ["plan"],
        "on": "pointerover",
        "clear": "pointerout",
        "nearest": True,
    }
    return chart(
        rows,
        [
            {
                "mark": {"type": "line", "interpolate": "step-before" if heads else "linear"},
                "encoding": {**encoding, "size": {**near, "legend": None}},
            },
            {
                "params": [{"name": "near", "select": select}],
                "mark": {"type": "point", "filled": True, "size": 30, "opacity": 1},
                "encoding": {**encoding, "shape": _shape(methods), "tooltip": tooltip},
            },
        ],
        height=280,
    )


LEGEND = {
    "orient": "bottom",
    "title": None,
    "columns": 3,
    "labelLimit": 260,
    "symbolLimit": 40,
    "symbolOpacity": 1,
}


def chart(rows: Sequence[Spec], layers: list[Spec], *, height: int) -> Spec:
    """As wide as its place on the page."""
    return {"data": {"values": list(rows)}, "width": "container", "height": height, "layer": layers}


_ONLY = {"name": "only", "select": {"type": "point", "fields": ["method"]}, "bind": "legend"}


def _faded(value: float) -> Spec:
    """Of what a click in the legend did not choose."""
    return {"condition": {"param": "only", "value": value}, "value": 0.1}


def _error_bars(method: str, methods: list[str], x: Spec, y: Spec) -> Spec:
    """Of one method, beside those of the others."""
    aside = 4 * (methods.index(method) - (len(methods) - 1) / 2)
    return {
        "transform": [{"filter": {"field": "method", "equal": method}}],
        "mark": {"type": "rule", "xOffset": aside},
        "encoding": {
            "x": x,
            "y": {**y, "field": "low"},
            "y2": {"field": "high"},
            "color": _method(methods),
            "opacity": _faded(0.4),
        },
    }


def _point_row(point: Point) -> Spec:
    row: Spec = {
        "method": point.method,
        "MACs %": round(100 * point.macs, 3),
        "top-1 %": round(point.top1, 3),
        "top-5 %": round(point.top5, 3),
        "low": round(point.low, 3),
        "high": round(point.high, 3),
        "95%": f"{point.low:.2f} to {point.high:.2f}",
        "front": point.on_front,
        "": _FRONT if point.on_front else "beaten",
        "schedule": point.note,
    }
    if point.kl is not None:
        row["KL"] = float(f"{point.kl:.4g}")
    if point.agreement is not None:
        row["agreement"] = round(point.agreement, 4)
    return row


def _macs_axis() -> Spec:
    return {
        "field": "MACs %",
        "type": "quantitative",
        "title": "multiply-accumulates (% of dense)",
        "scale": {"zero": False, "nice": False, "padding": 14},
        "axis": {"tickMinStep": 5},
    }


def _methods(rows: Sequence[Spec]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _method(methods: list[str]) -> Spec:
    return {"field": "method", "type": "nominal", "scale": {"domain": methods}, "legend": LEGEND}


def _shape(methods: list[str]) -> Spec:
    shapes = [SHAPES[number % len(SHAPES)] for number in range(len(methods))]
    return {
        "field": "method",
        "type": "nominal",
        "scale": {"domain": methods, "range": shapes},
        "legend": LEGEND,
    }


def _tooltip(rows: Sequence[Spec]) -> list[Spec]:
    hidden = {"low", "high", "front"}
    names = dict.fromkeys(name for row in rows for name in row if name not in hidden)
    return [{"field": name, "title": name or "standing", "type": "nominal"} for name in names]
