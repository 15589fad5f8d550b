"""Try what is promised, for as long as there is time:  python -m tests.faults --minutes 30 --seed 0"""

from __future__ import annotations

import argparse
import sys
from itertools import count

import torch

from tests.faults import properties
from tests.faults.campaign import Case, run
from tests.faults.fuzzing import fuzzers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for all campaigns together")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count on from it")
    parser.add_argument("--cases", type=int, default=None, help="at most so many of each campaign")
    parser.add_argument("--only", default="", help="campaigns whose name holds this")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    campaigns: dict[str, Case] = {"properties": properties.case}
    campaigns |= {f"fuzzing: {name}": case for name, case in fuzzers().items()}
    chosen = {name: case for name, case in campaigns.items() if asked.only in name}
    if not chosen:
        parser.error(f"no campaign is called {asked.only!r}; there are {', '.join(campaigns)}")
    shares = {name: 0.5 if name == "properties" else 0.5 / len(fuzzers()) for name in chosen}
    failed = 0
    for name, case in chosen.items():
        seconds = 60 * asked.minutes * shares[name] / sum(shares.values())
        seeds = count(asked.seed) if asked.cases is None else range(asked.seed, asked.seed + asked.cases)
        tally = run(name, case, seeds, seconds=seconds)
        print(tally.summary(), flush=True)
        failed += len(tally.failures)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
