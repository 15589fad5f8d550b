"""Tables of comparisons that ``cpvit sweep`` does not make: draws of the search, and other projects' code."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from evidence.records import Loaded
from evidence.tables import markdown


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
    commands = "\n".join(record["made_by"]["command"] for record in found)
    return f"```\n{commands}\n```\n\n{markdown(header, rows)}"


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
