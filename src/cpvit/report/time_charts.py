"""Charts of what was timed and trained, as Vega-Lite."""

from __future__ import annotations

from collections.abc import Sequence

from cpvit.report.charts import LEGEND, Spec, chart
from cpvit.report.speed import Speed
from cpvit.report.training import Run


def speed_chart(rows: Sequence[Speed]) -> Spec:
    """Speed-up over dense with its 10th and 90th percentile, next to what the MACs promise."""
    values = [
        {
            "name": row.name,
            "setting": row.setting,
            "speed-up": round(row.speedup[0], 4),
            "p10": round(row.speedup[1], 4),
            "p90": round(row.speedup[2], 4),
            "1 / MACs": round(1 / row.macs, 4) if row.macs else None,
            "efficiency": round(row.efficiency, 3),
            "images/s": round(row.images_per_s, 1),
            "ms median": round(row.latency[0], 2),
            "MACs %": round(100 * row.macs, 2),
        }
        for row in rows
    ]
    y = {"field": "name", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 220}}
    x = {"type": "quantitative", "title": "speed-up over dense (×), line: p10 to p90, cross: 1 / MACs"}
    names = ("name", "speed-up", "p10", "p90", "efficiency", "images/s", "ms median", "MACs %", "setting")
    tooltip = [{"field": name, "title": name} for name in names]
    return chart(
        values,
        [
            {"mark": {"type": "bar", "opacity": 0.3, "height": {"band": 0.6}}, "encoding": {
                "y": y, "x": {**x, "field": "speed-up"}, "tooltip": tooltip}},
            {"mark": {"type": "rule", "strokeWidth": 2.5}, "encoding": {
                "y": y, "x": {**x, "field": "p10"}, "x2": {"field": "p90"}, "tooltip": tooltip}},
            {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 1}, "encoding": {
                "y": y, "x": {**x, "field": "speed-up"}, "tooltip": tooltip}},
            {"mark": {"type": "point", "shape": "cross", "size": 60}, "encoding": {
                "y": y, "x": {**x, "field": "1 / MACs"}, "tooltip": tooltip}},
            {"mark": {"type": "rule", "strokeDash": [4, 4], "opacity": 0.7}, "encoding": {"x": {"datum": 1}}},
        ],
        height=max(90, 34 * len({row.name for row in rows}) + 40),
    )  # fmt: skip


def training_chart(runs: Sequence[Run], what: str) -> Spec:
    """``"loss"``, ``"rate"`` (of every step) or ``"top1"`` (of every evaluation) of all runs."""
    titles = {"loss": "training loss", "rate": "learning rate", "top1": "top-1 accuracy (%)"}
    rows = [
        {"step": point[0], titles[what]: point[1], "run": run.name}
        for run in runs
        for point in getattr(run, what)
    ]
    encoding = {
        "x": {"field": "step", "type": "quantitative"},
        "y": {"field": titles[what], "type": "quantitative", "scale": {"zero": False}},
        "color": {"field": "run", "type": "nominal", "legend": LEGEND},
        "tooltip": [{"field": "run"}, {"field": "step"}, {"field": titles[what], "format": ".4g"}],
    }
    mark = {"type": "line", "point": {"size": 45} if what == "top1" else {"size": 14, "opacity": 0.4}}
    return chart(rows, [{"mark": mark, "encoding": encoding}], height=240)
