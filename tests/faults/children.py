"""Child processes of one that has imported everything: forked, watched, killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BUG = 70
"""Exit status of a child in which something was raised that no command turns into an error."""


@dataclass(frozen=True)
class Child:
    """A process in a session of its own."""

    pid: int
    said: Path
    """What it wrote to stderr, once it has ended."""
    pipe: int
    """That comes from here: a file would be subject to the limits that the child gets."""


def start(work: Callable[[], int], said: Path) -> Child:
    """A child that does the work, whose result is its exit status."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    pid = os.fork()
    if pid:
        os.close(writing)
        said.write_bytes(b"")
        return Child(pid, said, reading)
    status = BUG
    try:
        os.setsid()
        os.close(reading)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(writing, 2)
        os.close(nowhere)
        os.close(writing)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        status = work()
        sys.stderr.flush()
    except BaseException:
        status = BUG
        with suppress(OSError):
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)  # whatever happens: nothing of the parent's business is the child's


def wait(child: Child, seconds: float = 300.0) -> int | None:
    """Its exit status, minus the signal that ended it, or None if it runs on."""
    limit = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        _keep_what_it_said(child)
        if pid:
            os.close(child.pipe)
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= limit:
            return None
        time.sleep(0.002)


def _keep_what_it_said(child: Child) -> None:
    """So that it never waits for a full pipe."""
    with suppress(BlockingIOError):
        while part := os.read(child.pipe, 1 << 16):
            with child.said.open("ab") as stream:
                stream.write(part)


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, also those in sessions of their own."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    """At once, whatever they do."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def kill_with_all(pid: int) -> None:
    """A process and all that it has started, none of which may start another in the meantime."""
    stopped: set[int] = set()
    while new := [process for process in family(pid) if process.pid not in stopped]:
        for process in new:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
            stopped.add(process.pid)
    kill(family(pid))


def end(child: Child) -> int:
    """Kill it and all it has started; its exit status."""
    kill(family(child.pid))
    status = wait(child)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # those whose parent was gone already
    assert status is not None, "a killed process did not end"
    return status


def finished(work: Callable[[], int], said: Path, seconds: float = 300.0) -> tuple[int, float]:
    """Exit status of a child that does the work, and the seconds it took.

    Raises:
        AssertionError: It did not end in that time; it is killed then.
    """
    begun = time.monotonic()
    child = start(work, said)
    status = wait(child, seconds)
    if status is None:
        end(child)
        raise AssertionError(f"still running after {seconds:.0f} s")
    return status, time.monotonic() - begun
