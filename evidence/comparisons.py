"""Tables of comparisons that ``cpvit sweep`` does not make: draws of the search, and other projects' code."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from evidence.intervals import differ, interval, lost_error
from evidence.records import Loaded
from evidence.tables import markdown

CLAIMED = 0.6
METHODS = {
    "cpvit-merge": "`cpvit-merge`",
    "cpvit": "`cpvit`, the paper's method",
    "tome": "ToMe, as published",
}
SAVED = ("patches gone (last block)", "MACs saved")
ONE_SIDED = 1.645
"""Standard errors on one side of which 95% lie."""


def seeds(records: Loaded) -> str:
    """What the search gains on images it has not seen, over draws of the calibration images."""
    found = [records[name] for name in ("search-seeds-60", "search-seeds-50")]
    rows = [_seeds(budget) for record in found for budget in record["budgets"]]
    header = [
        "MACs",
        "draws",
        "KL by the curve",
        "KL searched",
        "gain",
        "better, worse, the same",
        "agreement",
    ]
    return _below_commands(found, markdown(header, rows))


def _below_commands(records: list[Any], table: str) -> str:
    """The table below the commands that made its records."""
    commands = "\n".join(record["made_by"]["command"] for record in records)
    return f"```\n{commands}\n```\n\n{table}"


def _seeds(budget: Any) -> list[str]:
    draws = budget["draws"]
    gains = [draw["curve"] - draw["searched"] for draw in draws]
    counts = [
        sum(gain > 0 for gain in gains),
        sum(gain < 0 for gain in gains),
        sum(gain == 0 for gain in gains),
    ]
    agreed = [100 * (draw["agreement"] - draw["curve_agreement"]) for draw in draws]
    return [
        f"{100 * budget['macs']:.0f}%",
        str(len(draws)),
        _spread([draw["curve"] for draw in draws]),
        _spread([draw["searched"] for draw in draws]),
        _spread(gains),
        ", ".join(map(str, counts)),
        f"{fmean(agreed):+.2f} ± {stdev(agreed):.2f} points",
    ]


def _spread(values: list[float]) -> str:
    """Mean and standard deviation over the draws."""
    return f"{fmean(values):.4f} ± {stdev(values):.4f}"


def rivals(records: Loaded) -> str:
    """Other projects' code as it is, ours with the same numbers of tokens, and ``cpvit-merge`` at the same MACs."""
    found = [records["rivals-deit-tiny"], records["rivals-diffrate-deit-tiny"]]
    rows, theirs = [["dense", "", "100%", "", "", f"{found[0]['dense_top1']:.2f}", ""]], None
    for point in (point for record in found for point in record["points"]):
        theirs = point if point["whose"] == "theirs" else theirs
        rows.append([*_name(point), *_figures(point), _next_to(theirs, point)])
    header = [
        "",
        "whose code",
        "MACs",
        "KL",
        "agreement (95% interval)",
        "top-1 %",
        "right answers, next to theirs",
    ]
    return _below_commands(found, markdown(header, rows))


def released(records: Loaded) -> str:
    """The authors' released code, with the counter that was meant and the one that was released."""
    record = records["released-deit-tiny"]
    rows = []
    for point in record["points"]:
        low, high = interval(point["outcomes"]["agrees"])
        lost = record["dense_top1"] - point["top1"]
        error = lost_error(record["dense_right"], point["outcomes"]["right"])
        rows.append(
            [
                f"as {point['counter']}"
                + ("" if point["macs"] is None else f", scaled to {point['macs']:.0%}"),
                f"({100 * point['macs_ratio']:.1f}%)",
                f"{point['top1']:.2f} ({-lost:+.2f} ± {error:.2f})",
                f"{point['top5']:.2f}",
                f"{point['agreement']:.3f} ({low / 100:.3f} to {high / 100:.3f})",
                f"{point['kl']:.4f} ± {point['outcomes']['kl_error']:.4f}",
            ]
        )
    header = ["", "MACs", "top-1 % (next to dense)", "top-5 %", "agreement (95% interval)", "KL"]
    return _below_commands([record], markdown(header, rows))


def same_as_rivals(records: Loaded) -> str:
    """How far the logits of our versions are from theirs."""
    record = records["rivals-deit-tiny"]
    rows = [
        [
            f"{point['method']}, {point['setting']}",
            f"{point['float64']:.0e}",
            f"{point['difference_median']:.0e}",
            f"{point['difference']:.0e}",
            str(point["images_apart"]),
        ]
        for point in record["points"]
        if point["whose"] == "ours"
    ]
    header = [
        f"logits, ours less theirs ({record['images']} images)",
        f"float64, largest of {record['exact_images']} images",
        "float32, median image",
        "float32, largest",
        "float32, images above 1e-3",
    ]
    return markdown(header, rows)


def _name(point: Any) -> list[str]:
    if point["whose"] == "cpvit-merge":
        return ["**`cpvit-merge`** at the same MACs", "ours"]
    return [f"{point['method']}, {point['setting']}", point["whose"]]


def _figures(point: Any) -> list[str]:
    low, high = interval(point["outcomes"]["agrees"])
    return [
        f"{100 * point['macs_ratio']:.1f}%",
        f"{point['kl']:.4f} ± {point['outcomes']['kl_error']:.4f}",
        f"{point['agreement']:.3f} ({low / 100:.3f} to {high / 100:.3f})",
        f"{point['top1']:.2f}",
    ]


def _next_to(theirs: Any, point: Any) -> str:
    """More or fewer right answers than their code, by McNemar's test on the same images."""
    if point is theirs:
        return ""
    right, other = point["outcomes"]["right"], theirs["outcomes"]["right"]
    if right == other:
        return "the same"
    if not differ(right, other):
        return "not apart"
    return "fewer" if right.count("1") < other.count("1") else "more"


def cifar10(records: Loaded) -> str:
    """Three methods on CIFAR-10, without training on their plans."""
    sweep = records["cifar10-deit-tiny"]
    rows = [["dense", "100%", f"{sweep['dense_top1']:.2f}", "", "", "", ""]]
    for point in sweep["points"]:
        (ours,) = [p for p in sweep["points"] if (p["method"], p["macs"]) == ("cpvit-merge", point["macs"])]
        low, high = interval(point["outcomes"]["agrees"])
        rows.append(
            [
                METHODS[point["method"]],
                f"{100 * point['macs_ratio']:.1f}%",
                f"{point['top1']:.2f}",
                _lost(sweep, point),
                f"{point['agreement']:.3f} ({low / 100:.3f} to {high / 100:.3f})",
                f"{point['kl']:.4f} ± {point['outcomes']['kl_error']:.4f}",
                _next_to(ours, point),
            ]
        )
    header = ["", "MACs", "top-1 %", "points lost", "agreement (95% interval)", "KL"]
    table = markdown([*header, "right answers, next to `cpvit-merge`"], rows)
    return f"```\n{sweep['made_by']['command']}\n```\n\n{sweep['images']} images:\n\n{table}"


def claim(records: Loaded) -> str:
    """Half of the patches gone, over 40% of the FLOPs saved, at most a point lost: row by row, without finetuning."""
    sweep = records["cifar10-claim"]
    rows = [
        [
            METHODS[point["method"]],
            *_saved(point["plan"], point["macs_ratio"]),
            _lost(sweep, point),
            _reached(point["top1_lost"], sweep["dense_right"], point["outcomes"]["right"]),
        ]
        for point in sweep["points"]
        if point["method"] in ("cpvit", "cpvit-merge") and point["macs"] <= CLAIMED
    ]
    images = f"without finetuning, {sweep['images']} CIFAR-10 test images"
    return markdown([images, *SAVED, "points lost", "reached"], rows)


def claim_finetuned(records: Loaded) -> str:
    """The same with finetuning, next to a dense model that was trained for as long."""
    record = records["cifar10-finetuned"]
    start, control = record["dense"]
    rows = [
        ["dense, where all began", "", "", f"{start['top1']:.2f}", "", ""],
        ["dense, trained on (control)", "", "", f"{control['top1']:.2f}", "", ""],
    ]
    for point in record["points"]:
        lost = control["top1"] - point["top1"]
        error = lost_error(control["right"], point["right"])
        rows.append(
            [
                METHODS[point["method"]],
                *_saved(point, point["macs_ratio"]),
                f"{point['top1']:.2f}",
                f"{lost:.2f} ± {error:.2f}",
                _reached(lost, control["right"], point["right"]),
            ]
        )
    images = f"with finetuning, {record['images']} CIFAR-10 test images"
    return markdown([images, *SAVED, "top-1 %", "points lost, next to the control", "reached"], rows)


def _saved(plan: Any, macs_ratio: float) -> list[str]:
    gone = 1 - plan["patches_per_block"][-2] / plan["num_patches"]
    return [f"{100 * gone:.0f}%", f"{100 * (1 - macs_ratio):.1f}%"]


def _lost(sweep: Any, point: Any) -> str:
    error = lost_error(sweep["dense_right"], point["outcomes"]["right"])
    return f"{point['top1_lost']:.2f} ± {error:.2f}"


def _reached(lost: float, dense: str, pruned: str) -> str:
    """Whether at most a point is lost, where the images decide it at 5%."""
    margin = ONE_SIDED * lost_error(dense, pruned)
    if lost + margin <= 1:
        return "yes"
    return "**no**" if lost - margin > 1 else "not decided by these images"
