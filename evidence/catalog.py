"""Every published table: the page it stands in, the records it is made from, and the commands that make those."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evidence import tables
from evidence.records import Loaded

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "records"
WEIGHTS = "deit_tiny_patch16_224.safetensors"
IMAGES = "imagenet-val-650.tar"
MODEL = f"--model deit_tiny_patch16_224 --checkpoint {WEIGHTS}"
DEIT_TINY = f"{MODEL} --data {IMAGES}"
EVERY_BUDGET = "0.95,0.9,0.8,0.7,0.6,0.5,0.4,0.3"


@dataclass(frozen=True)
class Record:
    """A file of ``records/``."""

    name: str
    command: str
    """What ``cpvit`` is called with; ``--json`` is added. Files are named without their folder."""
    minutes: float
    """On two cores of a Zen 3."""
    before: tuple[str, ...] = ()
    """Calls of ``cpvit`` that make files which the command needs."""

    @property
    def path(self) -> Path:
        return RECORDS / f"{self.name}.json"

    @property
    def arguments(self) -> list[str]:
        return shlex.split(self.command)


@dataclass(frozen=True)
class Table:
    """What stands between two markers of a page."""

    name: str
    page: str
    records: tuple[str, ...]
    text: Callable[[Loaded], str]


@dataclass(frozen=True)
class Check:
    """A record, and a cheaper command that must find the same as one of its rows."""

    record: str
    method: str
    macs: float
    command: str


ALL_RECORDS: tuple[Record, ...] = (
    Record("eval-deit-tiny", f"eval {DEIT_TINY} --method cpvit-merge --macs 0.6", 0.6),
    Record(
        "methods-deit-tiny",
        f"sweep {DEIT_TINY} --methods cpvit-merge,tome,cpvit,cpvit:linear-ramp --macs 0.6",
        1.2,
    ),
    Record(
        "layer-aware-deit-tiny",
        f"eval {DEIT_TINY} --method cpvit --macs 0.6 --calibration {IMAGES}",
        0.6,
    ),
    Record(
        "heads-deit-tiny",
        f"eval {DEIT_TINY} --method cpvit --macs 0.6 --head-keep-rate 0.8 --calibration {IMAGES}",
        0.6,
    ),
    Record(
        "budgets-deit-tiny",
        f"sweep {DEIT_TINY} --leave-out 128 --methods cpvit-merge,tome:curve,tome,pitome:curve,pitome,cpvit "
        f"--macs {EVERY_BUDGET}",
        8,
    ),
)

INT8 = f"--to openvino --int8 --with-preprocessing --calibration {IMAGES} --out deit.xml"
EXPORT = f"export {MODEL} {INT8}"
EXPORTED = f"eval --exported deit.xml --data {IMAGES} --leave-out 128 {MODEL}"
ALL_RECORDS += (
    Record(
        "escalation-deit-tiny",
        f"eval {DEIT_TINY} --leave-out 128 --plan pair.json",
        3,
        (f"plan {DEIT_TINY} --limit 128 --min-agreement 0.995 --escalate --out pair.json",),
    ),
    Record("int8-dense", EXPORTED, 2, (f"{EXPORT} --dense",)),
    Record("int8-60", EXPORTED, 3, (f"{EXPORT} --method cpvit-merge --macs 0.6",)),
    Record("int8-50", EXPORTED, 3, (f"{EXPORT} --method cpvit-merge --macs 0.5",)),
)

ALL_TABLES = (
    Table("escalation", "README.md", ("escalation-deit-tiny",), tables.escalation),
    Table("int8", "README.md", ("int8-dense", "int8-60", "int8-50"), tables.int8),
    Table("eval", "README.md", ("eval-deit-tiny",), tables.evaluation),
    Table(
        "methods",
        "README.md",
        ("methods-deit-tiny", "layer-aware-deit-tiny", "heads-deit-tiny"),
        tables.methods,
    ),
    Table("budgets", "README.md", ("budgets-deit-tiny",), tables.budgets),
    Table("cheapest", "README.md", ("budgets-deit-tiny",), tables.cheapest),
    Table("all-budgets", "docs/accuracy.md", ("budgets-deit-tiny",), tables.all_budgets),
)

CHECKS = (
    Check(
        "methods-deit-tiny",
        "cpvit-merge",
        0.6,
        f"eval {DEIT_TINY} --method cpvit-merge --macs 0.6",
    ),
)

NOT_YET = "measured before records were kept; its command stands beside it"
NO_MEASUREMENT = "describes, measures nothing"
TYPED: dict[str, tuple[tuple[str, str], ...]] = {
    "README.md": (
        ("| speed-up, efficiency at 60% of the MACs | float32 | bfloat16 |", NOT_YET),
        ("| | 100% of the MACs | 60% | 50% |", NOT_YET),
        ("| command | what it does |", NO_MEASUREMENT),
    ),
    "docs/accuracy.md": (
        ("| | MACs | top-1 % | top-5 % | agreement | KL | options |", "by a script that writes no record"),
    ),
    "docs/export.md": (
        ("| `--to` | file | runs in | needs |", NO_MEASUREMENT),
        (
            "| float32, speed-up over dense in the same runtime (10th to 90th percentile), efficiency | `cpvit` | "
            "`cpvit-merge` | ToMe |",
            NOT_YET,
        ),
        (
            "| DeiT-Tiny, batch 16, over dense float32 torch | float32: dense, `cpvit-merge` | int8: dense, "
            "`cpvit-merge` |",
            NOT_YET,
        ),
    ),
    "docs/speed.md": (
        (
            "| model | batch | method | float32: speed-up, efficiency | bfloat16 | peak MiB, dense and pruned "
            "(float32; bfloat16) |",
            NOT_YET,
        ),
        ("| | dense | `cpvit` at 60% of the MACs | ratio |", NOT_YET),
        ("| | version 0.1: ramp, constant | curves |", NOT_YET),
    ),
}
"""Tables with numbers that no record stands behind, by page: first line, and why."""
