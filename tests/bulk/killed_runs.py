"""Runs of ``cpvit`` that are killed: ``python killed_runs.py KILLS SEED LONGEST ARGUMENTS...``

Everything is imported once; each run is a child of this process, and is killed with all it has started: every other one
after a random time, the others a random moment after they have written a few parts. At the end the command line runs
undisturbed. Prints how many runs were killed, and how many parts each left.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cpvit.commands.cli import commands, main

torch.set_num_threads(1)


def run(arguments: list[str]) -> int:
    """A child that runs a command line, in a process group of its own."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os._exit(main(arguments))


def wait_for(child: int, seconds: float, written: Callable[[], bool] = lambda: False) -> bool:
    """Whether it ended by itself within that time, or before that was written."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not written():
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    return False


def count(out: Path) -> int:
    return len(list(out.glob("part-*")))


def kill(child: int) -> None:
    """The run, and its loader workers."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has not made its group yet
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main_of_this() -> None:
    kills, seed, longest = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    arguments = sys.argv[4:]
    commands()
    out = Path(arguments[arguments.index("--out") + 1])
    generator = random.Random(seed)
    killed, left = 0, []
    while killed < kills:
        child, wanted = run(arguments), count(out) + generator.randint(1, 3)
        if killed % 2:
            ended = wait_for(child, generator.uniform(0, longest))
        else:
            ended = wait_for(child, 60, lambda wanted=wanted: count(out) >= wanted)
            ended = ended or wait_for(child, generator.uniform(0, 0.05))
        if ended:
            left.append(-1)
            for path in out.glob("part-*"):  # it was done too early: once more from the beginning
                path.unlink()
            continue
        kill(child)
        killed += 1
        left.append(count(out))
    status = os.waitpid(run(arguments), 0)[1]
    print(killed, *left)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main_of_this()
