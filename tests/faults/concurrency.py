"""Many threads and processes call one pruned model: each gets the answers it would get alone, and memory stays flat."""

from __future__ import annotations

import copy
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from cpvit import PruneConfig, PruningBypassError, prune_, unprune_
from cpvit.methods import METHODS
from tests.faults.children import start, wait
from tests.faults.subjects import SIDE, network_of

THREADS, PROCESSES, BATCHES = 64, 8, 16
SECONDS = float(os.environ.get("CPVIT_BURST", "10"))
"""Of one burst of calls."""
GROWTH = 32 * 2**20
"""Bytes by which memory may grow after the first quarter of a burst: what the allocator keeps for each thread."""


def pruned(method: str, macs: float = 0.7) -> nn.Module:
    network = network_of(0).double()
    prune_(network, PruneConfig(method=method, macs=macs))
    return network


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1 + number % 4, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
        for number in range(BATCHES)
    ]


@torch.no_grad()
def answer(network: Any, images: Tensor) -> Tensor:
    found: Tensor = network(images)
    return found


def compared(network: nn.Module) -> Callable[[int], str]:
    """Calls the network with one of the batches, and tells whether the answer is the one given alone."""
    images = batches()
    alone = [answer(network, one) for one in images]

    def call(number: int) -> str:
        place = number % BATCHES
        return "as alone" if torch.equal(answer(network, images[place]), alone[place]) else "another answer"

    return call


def rounded_alike(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding: while prune_ counts MACs, torch takes another attention kernel in every thread."""
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@dataclass
class Calls:
    """What many callers got until the time was up."""

    seconds: float = field(default_factory=lambda: SECONDS)
    outcomes: Counter[str] = field(default_factory=Counter)
    early: int = 0
    """Bytes of memory after a quarter of the time."""
    late: int = 0

    def make(self, one: Callable[[int], str], callers: int) -> None:
        """Let so many threads call, each with its own sequence of numbers."""
        begun = time.monotonic()
        end = begun + self.seconds
        lock = threading.Lock()

        def calling(caller: int) -> None:
            number, own = caller, Counter[str]()
            while time.monotonic() < end:
                try:
                    own[one(number)] += 1
                except Exception as error:
                    own[f"{type(error).__name__}: {str(error)[:100]}"] += 1
                number += callers + 1
            with lock:
                self.outcomes += own

        threads = [threading.Thread(target=calling, args=(caller,)) for caller in range(callers)]
        for thread in threads:
            thread.start()
        time.sleep(self.seconds / 4)
        self.early = memory()
        for thread in threads:
            thread.join()
        self.late = memory()

    def check(self, allowed: set[str]) -> int:
        """How many calls there were; all of them must have come to what is allowed, in flat memory."""
        wrong = {what: many for what, many in self.outcomes.items() if what not in allowed}
        assert not wrong, f"{wrong} among {dict(self.outcomes)}"
        grown = self.late - self.early
        assert grown < GROWTH, f"memory grew by {grown / 2**20:.1f} MiB in {self.seconds:.0f} s"
        return sum(self.outcomes.values())


def memory() -> int:
    return int(psutil.Process().memory_info().rss)


def threads(seed: int) -> str:
    """One model, 64 threads.

    Raises:
        AssertionError: An answer differs from the one given alone, in a single bit, or memory grows.
    """
    one = compared(pruned(sorted(METHODS)[seed % len(METHODS)]))
    calls = Calls()
    calls.make(one, THREADS)
    return f"{_rounded(calls.check({'as alone'}))} calls as alone"


def processes(seed: int) -> str:
    """One model in the memory of 8 processes.

    Raises:
        AssertionError: As for :func:`threads`, in any of them.
    """
    one = compared(pruned(sorted(METHODS)[seed % len(METHODS)]))

    def work() -> int:
        calls = Calls()
        calls.make(one, 1)
        calls.check({"as alone"})
        return 0

    with tempfile.TemporaryDirectory() as folder:
        children = [start(work, Path(folder) / str(number)) for number in range(PROCESSES)]
        for child in children:
            assert wait(child) == 0, child.said.read_text()[-500:]
    return "as alone"


def pruning(seed: int) -> str:
    """Threads call a model that another thread prunes and unprunes, patches only: whole answers or an error.

    Raises:
        AssertionError: An answer is that of no state the model was in, or the model is not restored.
    """
    choose = random.Random(seed)
    network = network_of(0).double()
    before = copy.deepcopy(network.state_dict())
    configs = [
        PruneConfig(method=choose.choice(sorted(METHODS)), macs=choose.uniform(0.5, 0.9)) for _ in range(2)
    ]
    images = batches()
    known = {"dense": [answer(network, one) for one in images]}
    for number, config in enumerate(configs):
        prune_(network, config)
        known[f"plan {number}"] = [answer(network, one) for one in images]
        unprune_(network)

    def one(number: int) -> str:
        if number % 9 == 0:
            change(network, configs, number)
            return "changed"
        place = number % BATCHES
        try:
            found = answer(network, images[place])
            close = [name for name, answers in known.items() if rounded_alike(found, answers[place])]
        except PruningBypassError:
            return "refused"
        return "whole" if close else "an answer of no state"

    lock = threading.Lock()

    def change(network: nn.Module, configs: list[PruneConfig], number: int) -> None:
        with lock:  # two threads that prune at once must agree between themselves
            unprune_(network) if number % 2 else prune_(network, configs[number % 4 // 2])

    calls = Calls()
    calls.make(one, 8)
    calls.check({"whole", "changed", "refused"})
    unprune_(network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(answer(network, images[0]), known["dense"][0]), "not restored"
    return "whole answers and refusals" if calls.outcomes["refused"] else "whole answers"


def swapping(seed: int) -> str:
    """The way the documentation advises: prune a copy, and then let it take the model's place.

    Raises:
        AssertionError: An answer is neither the old one nor the new one, or a call fails.
    """
    served = {"model": pruned("cpvit-merge", 0.8)}
    images = batches()
    known = []
    for macs in (0.8, 0.6):
        network = pruned("cpvit-merge", macs)
        known.append([answer(network, one) for one in images])

    def one(number: int) -> str:
        if number % 64 == 0:
            replacement = copy.deepcopy(served["model"])
            prune_(replacement, PruneConfig(method="cpvit-merge", macs=(0.8, 0.6)[number // 64 % 2]))
            served["model"] = replacement
            return "swapped"
        place = number % BATCHES
        found = answer(served["model"], images[place])
        return "whole" if any(rounded_alike(found, answers[place]) for answers in known) else "another answer"

    calls = Calls()
    calls.make(one, 16)
    calls.check({"whole", "swapped"})
    return "whole answers"


def _rounded(number: int) -> str:
    return "under a hundred" if number < 100 else "hundreds of" if number < 1000 else "thousands of"


def campaigns() -> dict[str, Callable[[int], str]]:
    """By name."""
    return {
        "concurrency: threads": threads,
        "concurrency: processes": processes,
        "concurrency: pruning while others call": pruning,
        "concurrency: swapping while others call": swapping,
    }
