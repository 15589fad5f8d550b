"""Make records, write the pages, check that a record still holds."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from evidence import pages
from evidence.catalog import ALL_RECORDS, ALL_TABLES, CHECKS, NOT_MADE, ROOT, Check
from evidence.records import load, run

TOLERANCES = {"top1": 0.5, "agreement": 0.005, "kl": 0.0005}
"""Of a repeated accuracy: another CPU rounds otherwise, which turns an image or two."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="tables or records to make anew")
    parser.add_argument(
        "--list", action="store_true", help="name every table, its command and how long it takes"
    )
    parser.add_argument(
        "--write", action="store_true", help="write all tables into the pages, from the records"
    )
    parser.add_argument(
        "--check", action="store_true", help="repeat a cheap sample and compare it with the records"
    )
    parser.add_argument("--inputs", type=Path, nargs="+", default=[], help="folders of weights and images")
    asked = parser.parse_args(arguments)
    if asked.list:
        print(listing())
    for name in records_of(asked.names):
        record = next(record for record in ALL_RECORDS if record.name == name)
        before = [call.split() for call in record.before]
        record.path.write_text(run(record.arguments, before, asked.inputs, record.study))
        print(f"record: {record.path.relative_to(ROOT)}")
    if asked.write or asked.names:
        for page in dict.fromkeys(table.page for table in ALL_TABLES):
            path = ROOT / page
            path.write_text(pages.written(path.read_text(), texts()))
        for name in sorted(not_there()):
            print(f"{name} was not made: {NOT_MADE.get(name, 'its tables keep the text they hold')}")
    if asked.check:
        return report([found for check in CHECKS for found in differences(check, asked.inputs)])
    return 0


def records_of(names: list[str]) -> list[str]:
    """The records that the named tables are made from; a record may be named itself.

    Raises:
        SystemExit: Nothing has this name.
    """
    known = {table.name: table.records for table in ALL_TABLES} | {
        record.name: (record.name,) for record in ALL_RECORDS
    }
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no table or record is called {', '.join(unknown)}; there are {', '.join(known)}")
    return list(dict.fromkeys(record for name in names for record in known[name]))


def texts() -> dict[str, str | None]:
    """Every table, from its records; None for one that waits for a record."""
    missing = not_there()
    loaded = {record.name: load(record.path) for record in ALL_RECORDS if record.name not in missing}
    return {table.name: None if missing & set(table.records) else table.text(loaded) for table in ALL_TABLES}


def not_there() -> set[str]:
    """Records without a file."""
    return {record.name for record in ALL_RECORDS if not record.path.is_file()}


def listing() -> str:
    lines = []
    for table in ALL_TABLES:
        lines.append(f"{table.name} ({table.page})")
        for record in ALL_RECORDS:
            if record.name in table.records:
                lines += [
                    f"  {record.name}, about {record.minutes:g} min",
                    *(f"    cpvit {call}" for call in record.before),
                    f"    {record.typed}",
                ]
    return "\n".join(lines)


def differences(check: Check, inputs: list[Path]) -> list[str]:
    """What a repeated evaluation finds otherwise than the record says; counts and MACs must be equal."""
    record = load(ROOT / "records" / f"{check.record}.json")
    (point,) = [p for p in record["points"] if (p["method"], p["macs"]) == (check.method, check.macs)]
    again = json.loads(run(check.command.split(), [], inputs))
    return compare(point, again, f"{check.record}, {check.method} at {check.macs:g}")


def compare(point: Any, again: Any, name: str) -> list[str]:
    """Differences between a row of a sweep and an evaluation, beyond what rounding explains."""
    found = []
    if again["plan"]["patches_per_block"] != point["plan"]["patches_per_block"]:
        found.append(f"{name}: patches leaving each block are {again['plan']['patches_per_block']}")
    if again["macs_ratio"] != point["macs_ratio"]:
        found.append(f"{name}: MACs ratio is {again['macs_ratio']}, recorded {point['macs_ratio']}")
    figures = {"top1": again["pruned"]["top1"], "agreement": again["agreement"], "kl": again["kl"]}
    for key, value in figures.items():
        if abs(value - point[key]) > TOLERANCES[key]:
            found.append(f"{name}: {key} is {value:.4f}, recorded {point[key]:.4f}")
    return found


def report(found: list[str]) -> int:
    print("\n".join(found) or "the records hold")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
