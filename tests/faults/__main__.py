"""Try what is promised, for as long as there is time:  python -m tests.faults --minutes 30 --seed 0"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from itertools import count

import torch

from tests.faults import concurrency, kills, leaving, properties, resources
from tests.faults.campaign import Case, run
from tests.faults.fuzzing import fuzzers

SHARES = {"properties": 0.25, "fuzzing": 0.25, "kills": 0.25, "resources": 0.15, "concurrency": 0.1}
"""Of the time, for all campaigns whose name begins so."""


def campaigns() -> dict[str, Case]:
    """By name."""
    found: dict[str, Case] = {"properties": properties.case}
    found |= {f"fuzzing: {name}": case for name, case in fuzzers().items()}
    found |= kills.campaigns() | resources.campaigns() | concurrency.campaigns()
    return found | leaving.campaigns()


def shares(names: list[str]) -> dict[str, float]:
    """Of the time, for each of these; they add up to 1."""
    kinds = [name.split(":")[0] for name in names]
    found = {name: SHARES[kind] / kinds.count(kind) for name, kind in zip(names, kinds, strict=True)}
    return {name: share / sum(found.values()) for name, share in found.items()}


def _called(name: str, part: str, known: Collection[str]) -> bool:
    return name == part if part in known else part in name


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for all campaigns together")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count on from it")
    parser.add_argument("--cases", type=int, default=None, help="at most so many of each campaign")
    parser.add_argument("--only", nargs="+", default=[""], help="campaigns that are called so, or hold it")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = campaigns()
    chosen = [name for name in known if any(_called(name, part, known) for part in asked.only)]
    if not chosen:
        parser.error(f"no campaign is called {asked.only!r}; there are {', '.join(known)}")
    failed = 0
    for name, share in shares(chosen).items():
        seeds = count(asked.seed) if asked.cases is None else range(asked.seed, asked.seed + asked.cases)
        tally = run(name, known[name], seeds, seconds=60 * asked.minutes * share)
        print(tally.summary(), flush=True)
        failed += len(tally.failures)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
