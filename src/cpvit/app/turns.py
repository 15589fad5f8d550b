"""Who computes when: answers come before timings, and nothing else runs while something is timed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

LET_OTHERS = 0.002
"""Seconds between two pieces of long work, so that a thread that waits gets its turn (locks are not fair)."""
MOST_ATTEMPTS = 50


class _OvertakenError(Exception):
    """Someone waits for an answer, so that a timing stops."""


class Turns:
    """One piece of work at a time, for all people that look at the page."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = threading.Lock()
        self._waiting = 0

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Work that somebody waits for."""
        with self._count:
            self._waiting += 1
        try:
            with self._lock:
                yield
        finally:
            with self._count:
                self._waiting -= 1

    def timed(self, work: Callable[[Callable[[float], None]], T]) -> T:
        """Run ``work``, undisturbed; it is stopped for every answer that is asked for meanwhile, and starts again.

        Args:
            work: Gets a function to call every now and then (the progress of :func:`cpvit.machine.timer.interleave`).

        Raises:
            TimeoutError: It was stopped too often.
        """
        for _ in range(MOST_ATTEMPTS):
            try:
                with self._lock:
                    return work(self._give_way)
            except _OvertakenError:
                time.sleep(LET_OTHERS)
        raise TimeoutError("the machine was too busy to time anything; try again")

    def shared(self, items: Iterable[T]) -> Iterator[T]:
        """Items of long work: what is done with each is a turn, and others have theirs in between."""
        for item in items:
            with self._lock:
                yield item
            time.sleep(LET_OTHERS)

    def _give_way(self, share: float) -> None:
        if self._waiting:
            raise _OvertakenError
