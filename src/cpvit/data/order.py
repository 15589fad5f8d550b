"""The order in which training meets the samples, computed from the seed and the position alone.

Training walks through epoch after epoch without a break. Sample number g belongs to epoch g // n and is the
(g mod n)-th of that epoch's permutation of the n samples. Step s of R processes with batches of B takes the
numbers from s R B on, of which process r takes the r-th part of B. So a run can start at any step with no
stored sampler state, and R processes with batches of B meet the samples that one with batches of R B meets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

# Separate streams of random numbers, so that no two uses ever share one.
_ORDER, _AUGMENTATION, _MIXING = range(3)


def order_seed(seed: int, epoch: int) -> np.random.SeedSequence:
    """For the permutation of an epoch."""
    return np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))


def augmentation_seed(seed: int, number: int) -> np.random.SeedSequence:
    """For the augmentation of one sample number."""
    return np.random.SeedSequence(seed, spawn_key=(_AUGMENTATION, number))


def mixing_seed(seed: int, step: int, rank: int) -> np.random.SeedSequence:
    """For the mixing of one batch."""
    return np.random.SeedSequence(seed, spawn_key=(_MIXING, step, rank))


@dataclass(frozen=True)
class Share:
    """The sample numbers of one loader worker: its rank's part of every `stride`-th step from `first` on.

    Attributes:
        batch_size: Samples per step and rank.
        rank: This process among `world_size`.
        world_size: Processes.
        first: Step to begin with.
        stride: Distance of its steps.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    first: int = 0
    stride: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")
        check_rank(self.rank, self.world_size)
        if self.first < 0:
            raise ValueError(f"step is {self.first}; expected at least 0")

    def of_worker(self, worker: int, num_workers: int) -> Share:
        """The part of one of `num_workers` loader workers, which take the steps in turn."""
        return replace(self, first=self.first + worker, stride=num_workers)

    def steps(self) -> Iterator[int]:
        """The steps, without end."""
        return count(self.first, self.stride)

    def numbers(self, step: int) -> range:
        """The sample numbers of one step."""
        start = (step * self.world_size + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def takes(self, numbers: Numbers) -> npt.NDArray[np.bool_]:
        """Which of these sample numbers are in it."""
        part = numbers // self.batch_size
        step = part // self.world_size - self.first
        return (part % self.world_size == self.rank) & (step >= 0) & (step % self.stride == 0)


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a rank that is none."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of world_size {world_size}; expected 0 <= rank < world_size")


def shuffled(size: int, seed: int, epoch: int) -> Numbers:
    """A permutation of `size` samples."""
    return np.random.default_rng(order_seed(seed, epoch)).permutation(size)


@dataclass(frozen=True)
class StreamOrder:
    """One epoch over files that can only be read from front to back.

    The files come in shuffled order. Their samples, which so have a place in one long stream, leave a shuffle
    buffer: the sample at place i is drawn a key, uniform from i to i + `buffer`, and the samples leave in the
    order of their keys. None leaves `buffer` places before or after its own, and the whole order is known
    without reading anything.

    Attributes:
        files: Indices of the files in the order of reading `[files]`.
        numbers: The sample number, counted over all epochs, of each place of the stream `[samples]`.
    """

    files: Numbers
    numbers: Numbers


def stream_order(sizes: Sequence[int], seed: int, epoch: int, buffer: int) -> StreamOrder:
    """The order of an epoch over files that hold `sizes` samples."""
    generator = np.random.default_rng(order_seed(seed, epoch))
    total = sum(sizes)
    files = generator.permutation(len(sizes))
    keys = np.arange(total) + generator.uniform(0, buffer, total)
    numbers = np.empty(total, np.int64)
    numbers[np.argsort(keys, kind="stable")] = np.arange(epoch * total, (epoch + 1) * total)
    return StreamOrder(files, numbers)
