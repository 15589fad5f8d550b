"""The records a report is made of, told apart by what they hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from cpvit.report.fields import Fields, ReportError

Kind: TypeAlias = Literal[
    "sweep",
    "eval",
    "saved eval",
    "exported eval",
    "benchmark",
    "benchmarks",
    "comparison",
    "runtimes",
    "finetune",
    "search",
    "timed search",
    "escalation",
    "pair",
    "export",
    "plan",
]

KEYS: dict[Kind, set[str]] = {
    "sweep": {"points", "dense_top1", "dense_macs"},
    "eval": {"dense", "pruned", "agreement", "kl", "macs_ratio"},
    "exported eval": {"description", "top1", "images"},
    "export": {"description", "parity", "bytes"},
    "benchmark": {"dense", "pruned", "speedup_by_round", "rounds"},
    "benchmarks": {"settings", "failed"},
    "comparison": {"dense", "rows", "rounds"},
    "runtimes": {"rows", "rounds", "batch_size"},
    "finetune": {"history", "evaluations", "config"},
    "search": {"plan", "start_kl", "evaluations"},
    "timed search": {"tuned", "speedup", "searches"},
    "escalation": {"found", "static_macs_ratio"},
    "pair": {"light", "margin"},
    "saved eval": {"pruned", "images", "plan"},
    "plan": {"patches_per_block", "num_heads", "method"},
}
"""What each kind has that those before it have not."""
COMMANDS = "cpvit eval, sweep, benchmark, finetune, plan or export"
MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Record:
    """One record."""

    source: str
    """The name of its file."""
    kind: Kind
    fields: Fields


def load_record(path: Path) -> Record:
    """Read a file that ``--json`` wrote, or a plan.

    Raises:
        ReportError: There is no such file, or it is none of these.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ReportError(f"{path} has {size >> 20} MiB; a record has at most {MOST_BYTES >> 20}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ReportError(f"{path} is no text; give a file that --json of {COMMANDS} wrote") from None
    return read_record(text, path.name, str(path))


def read_record(text: str, source: str, place: str | None = None) -> Record:
    """A record from its JSON.

    Raises:
        ReportError: It is none.
    """
    place = place or source
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ReportError(
            f"{place} is not JSON ({error}); give a file that --json of {COMMANDS} wrote"
        ) from None
    if not isinstance(values, dict):
        raise ReportError(
            f"{place} holds a {type(values).__name__}, not a record; give a file that --json of {COMMANDS} wrote"
        )
    for kind, keys in KEYS.items():
        if keys <= set(values):
            return Record(source, kind, Fields(values, place))
    held = ", ".join(sorted(map(str, values))[:8]) or "nothing"
    raise ReportError(
        f"{place} is none of the records that a report is made of (it holds {held}); give a file that --json of "
        f"{COMMANDS} wrote, or a plan"
    )
