"""From records to the tables of the pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from cpvit.commands.tables import eval_text
from cpvit.measure.evaluate import EvalResult
from cpvit.plans.plan import plan_from_values
from evidence.intervals import differ, interval, lost_error, share
from evidence.records import Loaded

OURS = "cpvit-merge"
TITLES = {
    "cpvit-merge": "**`cpvit-merge`**",
    "tome": "ToMe, as published (constant number)",
    "tome:curve": "ToMe with the schedule of `cpvit-merge`",
    "pitome": "PiToMe, as published (constant fraction)",
    "pitome:curve": "PiToMe with the schedule of `cpvit-merge`",
    "cpvit": "`cpvit`, removal",
}
README_BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4)


def evaluation(records: Loaded) -> str:
    """What ``cpvit eval`` prints, with its command."""
    record = records["eval-deit-tiny"]
    return f"```\n{record['made_by']['command']}\n```\n```\n{eval_text(_evaluation(record))}\n```"


def _evaluation(record: Any) -> EvalResult:
    """As much of the result as its text needs."""
    values = json.loads(json.dumps(record), object_hook=lambda fields: SimpleNamespace(**fields))
    values.plan = plan_from_values(record["plan"])
    return cast(EvalResult, values)


def methods(records: Loaded) -> str:
    """One budget, every method, on all images."""
    sweep = records["methods-deit-tiny"]
    rows = [["dense", "100%", f"{sweep['dense_top1']:.2f}", f"{sweep['dense_top5']:.2f}", "", "", ""]]
    added = {
        "cpvit-merge": "(as above)",
        "tome": "`--method tome`",
        "cpvit": "`--method cpvit`",
        "cpvit:linear-ramp": "`--method cpvit --schedule linear-ramp`",
    }
    named = {
        "cpvit-merge": "**`cpvit-merge`**, no images, no search",
        "tome": "ToMe, as published",
        "cpvit": "the paper's method, no images",
        "cpvit:linear-ramp": "... with the released ramp",
    }
    for point in sweep["points"]:
        rows.append([named[point["method"]], *_figures(point, sweep["dense_right"]), added[point["method"]]])
    images = "--calibration imagenet-val-650.tar"
    for name, title, how in (
        ("layer-aware-deit-tiny", "... layer-aware", f"`--method cpvit {images}`"),
        (
            "heads-deit-tiny",
            "... with heads cut (2 of 3 left in the last 4 blocks)",
            f"`--method cpvit --head-keep-rate 0.8 {images}`",
        ),
    ):
        rows.append([title, *_figures(_point(records[name]), records[name]["dense_right"]), how])
    header = [
        "",
        "MACs",
        "top-1 % (next to dense)",
        "top-5 %",
        "agreement",
        "KL",
        "instead of `--method cpvit-merge`",
    ]
    return markdown(header, rows)


def _point(record: Any) -> Any:
    """A row of a sweep, from the record of an evaluation."""
    return {**record, "top1": record["pruned"]["top1"], "top5": record["pruned"]["top5"]}


def _figures(point: Any, dense_right: str) -> list[str]:
    low, high = interval(point["outcomes"]["agrees"])
    return [
        f"{100 * point['macs_ratio']:.1f}%",
        f"{point['top1']:.2f} ({_lost(dense_right, point['outcomes']['right'])})",
        f"{point['top5']:.2f}",
        f"{point['agreement']:.3f} ({low / 100:.3f} to {high / 100:.3f})",
        f"{point['kl']:.4f} ± {point['outcomes']['kl_error']:.4f}",
    ]


def _lost(dense: str, pruned: str) -> str:
    """Points gained or lost, ± their standard error."""
    return f"{share(pruned) - share(dense):+.2f} ± {lost_error(dense, pruned):.2f}"


def escalation(records: Loaded) -> str:
    """Two stages next to the dense model."""
    record = records["escalation-deit-tiny"]
    low, high = interval(record["outcomes"]["agrees"])
    row = [
        f"{record['images']} images, two stages",
        f"{100 * record['macs_ratio']:.1f}%",
        f"{100 * record['escalation']['share']:.0f}%",
        f"{record['agreement']:.4f} ({low / 100:.3f} to {high / 100:.3f})",
        f"{record['dense']['top1'] - record['pruned']['top1']:.2f}",
        f"{record['kl']:.4f} ± {record['outcomes']['kl_error']:.4f}",
    ]
    header = ["", "MACs on average", "ran twice", "dense prediction (95% interval)", "top-1 lost", "KL"]
    return markdown(header, [row])


def int8(records: Loaded) -> str:
    """Exported files next to the dense torch model."""
    titles = {
        "int8-dense": "int8, dense (`--dense`)",
        "int8-60": "**int8, `cpvit-merge` at 60% of the MACs**",
        "int8-50": "int8, `cpvit-merge` at 50% (`--macs 0.5`)",
    }
    rows = []
    for name, title in titles.items():
        record, dense = records[name], records[name]["dense"]
        lost = dense["top1"] - record["top1"]
        same = round(dense["agreement"] * record["images"])
        low, high = interval("1" * same + "0" * (record["images"] - same))
        agreed = f"{dense['agreement']:.3f} ({low / 100:.3f} to {high / 100:.3f})"
        rows.append([title, f"{lost:.2f}", agreed, f"{dense['kl']:.4f}"])
    images = records["int8-60"]["images"]
    return markdown([f"{images} images, next to dense float32 torch", "top-1 lost", "agreement", "KL"], rows)


def budgets(records: Loaded) -> str:
    """Methods by budgets: KL, agreement, points lost; an asterisk where top-1 differs from ours beyond the noise."""
    return _by_budget(records["budgets-deit-tiny"], README_BUDGETS)


def all_budgets(records: Loaded) -> str:
    """The same for the whole range, a row for each method and budget."""
    sweep = records["budgets-deit-tiny"]
    rows = []
    for method in dict.fromkeys(point["method"] for point in sweep["points"]):
        for point in _of(sweep, method):
            low, high = interval(point["outcomes"]["agrees"])
            error = lost_error(sweep["dense_right"], point["outcomes"]["right"])
            rows.append(
                [
                    TITLES[method],
                    f"{100 * point['macs_ratio']:.1f}%",
                    f"{point['kl']:.4f} ± {point['outcomes']['kl_error']:.4f}",
                    f"{point['agreement']:.4f} ({low / 100:.3f} to {high / 100:.3f})",
                    f"{point['top1_lost']:.2f} ± {error:.2f}",
                    _versus(sweep, point),
                ]
            )
    header = ["", "MACs", "KL", "agreement (95% interval)", "top-1 points lost", "next to `cpvit-merge`"]
    return markdown(header, rows)


def cheapest(records: Loaded) -> str:
    """For what is lost at most: the least MACs at which a method was measured to lose no more."""
    sweep = records["budgets-deit-tiny"]
    limits = (0.2, 0.5, 1.0, 2.0)
    rows = []
    for method in dict.fromkeys(point["method"] for point in sweep["points"]):
        cells = []
        for limit in limits:
            fit = [p["macs_ratio"] for p in _of(sweep, method) if _lost_up_to(sweep, method, p) <= limit]
            cells.append(f"{100 * min(fit):.0f}%" if fit else "none")
        rows.append([TITLES[method], *cells])
    return markdown(["least MACs at which at most ... points are lost", *map(str, limits)], rows)


def _lost_up_to(sweep: Any, method: str, point: Any) -> float:
    """The most that is lost at this budget or a gentler one: a lucky row does not count."""
    return max(float(p["top1_lost"]) for p in _of(sweep, method) if p["macs_ratio"] >= point["macs_ratio"])


def _by_budget(sweep: Any, chosen: Sequence[float]) -> str:
    rows = []
    for method in dict.fromkeys(point["method"] for point in sweep["points"]):
        cells = []
        for macs in chosen:
            (point,) = [p for p in _of(sweep, method) if p["macs"] == macs]
            worse = "\\*" if _versus(sweep, point).startswith(("fewer", "more")) else ""
            cells.append(f"{point['kl']:.4f}, {point['agreement']:.3f}, {point['top1_lost']:.2f}{worse}")
        rows.append([TITLES[method], *cells])
    header = ["KL, agreement, top-1 points lost", *(f"{100 * macs:.0f}% of the MACs" for macs in chosen)]
    return markdown(header, rows)


def _versus(sweep: Any, point: Any) -> str:
    """Whether a row is right on more or fewer images than ours at the same budget."""
    (ours,) = [p for p in _of(sweep, OURS) if p["macs"] == point["macs"]]
    if point is ours:
        return ""
    right, mine = point["outcomes"]["right"], ours["outcomes"]["right"]
    if not differ(right, mine):
        return "not apart"
    return "fewer right" if right.count("1") < mine.count("1") else "more right"


def _of(sweep: Any, method: str) -> list[Any]:
    return [point for point in sweep["points"] if point["method"] == method]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines).replace("|  |", "| |")
