"""``cpvit support``: what works with which model, measured here and now."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import shlex
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch

from cpvit.commands.common import progress_bar, say
from cpvit.files import write_atomically
from cpvit.machine.environment import Environment, describe_environment
from cpvit.measure.support import SupportRow, measure
from cpvit.measure.support_cases import CASES, Case

HEADER = (
    "family",
    "model",
    "blocks",
    "tokens",
    "heads",
    "keep-everything error",
    "patches leaving each block",
    "head pruning",
    "compile",
    "export",
    "save, load",
)
TITLE = "# Which models can be pruned"
ABOUT = (
    "The models are built small (4 blocks, 6 heads, random weights with which every part matters) and otherwise "
    "as they are; blocks, tokens and heads are those of the full model. *Keep-everything error*: largest "
    "difference from the untouched model's output, relative to the largest output, when every patch and head is "
    "kept. *Patches leaving each block*: counted while the small model ran at 0.6 of its multiply-accumulates. "
    "*Head pruning*: half of the heads cut out of the weights. *Compile*: one graph, the same output. *Export*: "
    "torch.export for any batch size, the same output. *Save, load*: `load_pruned` gives the same output, bit "
    "for bit."
)


def run(pattern: str = "", markdown: Path | None = None, json: Path | None = None, seed: int = 0) -> None:
    """Measure what works with which model: small models with random weights, a few seconds for each.

    Args:
        pattern: Only families or models that contain this, or match it as a wildcard (*siglip*).
        markdown: Also write the table, with what it means and where it was measured, to this file.
        json: Write the record to this file.
        seed: Of weights and images.
    """
    cases = _matching(pattern)
    rows = _measure_all(cases, seed)
    environment = describe_environment(torch.device("cpu"), torch.float32, seed)
    print(markdown_table(rows))
    if markdown is not None:
        write_atomically(markdown, document(rows, environment, pattern))
        say(f"table: {markdown}")
    if json is not None:
        record = {
            "rows": [dataclasses.asdict(row) for row in rows],
            "environment": dataclasses.asdict(environment),
        }
        write_atomically(json, jsonlib.dumps(record, indent=2) + "\n")
        say(f"record: {json}")
    _raise_on_failures(rows)


def _matching(pattern: str) -> tuple[Case, ...]:
    wildcard = (pattern if "*" in pattern else f"*{pattern}*").lower()
    found = tuple(
        case for case in CASES if any(fnmatch(text.lower(), wildcard) for text in (case.name, case.family))
    )
    if not found:
        families = "; ".join(dict.fromkeys(case.family for case in CASES))
        raise ValueError(f"no model or family matches {pattern!r}; there are {families}")
    return found


def _measure_all(cases: Sequence[Case], seed: int) -> list[SupportRow]:
    with progress_bar() as bar:
        return [measure(case, seed=seed) for case in bar.track(cases, description="models")]


def markdown_table(rows: Sequence[SupportRow]) -> str:
    """A row per model."""
    lines = [HEADER, ("---",) * len(HEADER), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: SupportRow) -> tuple[str, ...]:
    if row.failure:
        return (row.family, row.model, row.failure, *("",) * (len(HEADER) - 3))
    return (
        row.family,
        row.model,
        str(row.blocks),
        str(row.tokens),
        str(row.heads),
        f"{row.error:.1e}",
        f"{' '.join(map(str, row.survivors))} of {row.patches}",
        row.head_pruning,
        row.compiles,
        row.exports,
        row.saves,
    )


def document(rows: Sequence[SupportRow], environment: Environment, pattern: str = "") -> str:
    """The table with what it means, the command it comes from, versions and machine."""
    versions = ", ".join(f"{name} {number}" for name, number in environment.versions.items())
    chosen = f" --pattern {shlex.quote(pattern)}" if pattern else ""
    command = f"cpvit support{chosen} --markdown docs/support.md"
    measured = (
        f"Written by `{command}` on {environment.device_name} ({environment.device}, {environment.dtype}), "
        f"{versions}; {sum(not row.failed for row in rows)} of {len(rows)} models without a failure."
    )
    return "\n\n".join([TITLE, ABOUT, measured, markdown_table(rows)]) + "\n"


def _raise_on_failures(rows: Sequence[SupportRow]) -> None:
    failed = [row for row in rows if row.failed]
    if failed:
        names = ", ".join(row.model for row in failed)
        raise RuntimeError(f"{len(failed)} of {len(rows)} supported models fail: {names}; see their rows")
