"""Running a case many times under different seeds, and counting what came of it."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TypeAlias

Case: TypeAlias = Callable[[int], str]
"""A seed to one or two words for what happened; anything raised is a failure."""


@dataclass
class Tally:
    """What came of a campaign."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Seed, and the error."""
    slowest: float = 0.0
    """Seconds of the slowest case."""

    def summary(self) -> str:
        cases = sum(self.outcomes.values()) + len(self.failures)
        counted = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        lines = [
            f"{self.name}: {cases} cases, {len(self.failures)} failed; {counted}; slowest {self.slowest:.1f} s"
        ]
        return "\n".join([*lines, *(f"  seed {seed}: {error}" for seed, error in self.failures)])


def run(name: str, case: Case, seeds: Iterable[int], *, seconds: float = float("inf")) -> Tally:
    """Run the seeds in order until the time is up."""
    tally, end = Tally(name), time.monotonic() + seconds
    for seed in takewhile(lambda _: time.monotonic() < end, seeds):
        start = time.monotonic()
        try:
            tally.outcomes[case(seed)] += 1
        except Exception as error:
            tally.failures.append((seed, _words(error)))
        tally.slowest = max(tally.slowest, time.monotonic() - start)
    return tally


def _words(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__} at {last.filename.rsplit('/', 1)[-1]}:{last.lineno}: {text}"
