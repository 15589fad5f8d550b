"""What is kept of a result: the record as JSON, and the page about it."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cpvit.commands.options import RecordOptions
from cpvit.commands.terminal import say, typed_command
from cpvit.files import write_atomically
from cpvit.machine.processes import Processes
from cpvit.report import check_requirements, read_record, write_report


def check_output(options: RecordOptions) -> None:
    """Before anything runs for minutes: can what is asked for be written?

    Raises:
        ReportError: A package that makes the page is missing.
        ValueError: A folder is missing.
    """
    if options.report is not None:
        check_requirements()
    for flag, path in (("--json", options.json), ("--report", options.report)):
        if path is not None and not path.expanduser().parent.is_dir():
            raise ValueError(f"{flag} {path}: there is no folder {path.expanduser().parent}; make it first")


def keep(result: object, options: RecordOptions, processes: Processes | None = None) -> None:
    """Write the record and the page, whichever were asked for; the first of several processes does."""
    if not is_first(processes):
        return
    write_record(result, options.json)
    if options.report is not None:
        text = json.dumps(record_of(result), default=str)
        write_report([read_record(text, "this run")], options.report.expanduser())
        say(f"report: {options.report}")


def write_record(result: object, path: Path | None, processes: Processes | None = None) -> None:
    """Write a result's record as JSON, if asked for; the first of several processes does."""
    if path is None or not is_first(processes):
        return
    write_atomically(path.expanduser(), json.dumps(record_of(result), indent=2, default=str) + "\n")
    say(f"record: {path}")


def record_of(result: object) -> dict[str, Any]:
    """What ``--json`` writes: the result, and the command that made it."""
    made_by = {
        "record": type(result).__name__,
        "command": typed_command(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return {**dataclasses.asdict(result), "made_by": made_by}  # type: ignore[call-overload]


def is_first(processes: Processes | None) -> bool:
    """Whether this process writes files."""
    return processes is None or processes.is_main
