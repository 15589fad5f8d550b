"""``cpvit report``: one page about what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from cpvit.commands.terminal import say, timed
from cpvit.report import load_record, write_report


def run(records: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path = Path("report.html")) -> None:
    """Write one HTML file about what ``--json`` of eval, sweep, benchmark, finetune, plan and export recorded.

    The file needs no network and nothing beside it.

    Args:
        records: The files, in any mix; plans as well.
        out: The page to write.
    """
    with timed("report"):
        write_report([load_record(path.expanduser()) for path in records], out.expanduser())
    say(f"report: {out}")
