"""Two processes exchange something and leave their group at once, on a core that others are busy on: both end."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from cpvit.finetune import start_processes
from tests.faults.children import finished
from tests.faults.subjects import import_early, together

BUSY = 3
"""Processes that do nothing but take time from the two."""
PATIENCE = 60.0
"""Seconds in which both must have left; they take half of one."""


def case(seed: int) -> str:
    """One exchange, one farewell.

    Raises:
        AssertionError: They hang, or did not get what they exchanged.
    """
    import_early(["accelerate", "accelerate.utils"])
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        status, _ = finished(lambda: crowded(lambda: together(lambda: exchange(seed))), said, PATIENCE)
        assert status == 0, said.read_text()[-500:]
    return "both left"


def exchange(seed: int) -> int:
    """0 if every process has what all of them gave."""
    processes = start_processes("cpu")
    found = processes.gather([seed + processes.rank] * 100)
    processes.part()
    return int(found != [seed] * 100 + [seed + 1] * 100)


def crowded(work: Callable[[], int]) -> int:
    """Do the work on one core, next to processes that never rest."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    busy = [_spinning() for _ in range(BUSY)]
    try:
        return work()
    finally:
        for process in busy:
            os.kill(process, signal.SIGKILL)


def _spinning() -> int:
    process = os.fork()
    while not process:
        pass
    return process


def campaigns() -> dict[str, Callable[[int], str]]:
    """By name."""
    return {"concurrency: leaving a group": case}
