"""The order in which training meets the samples, computed from the seed and the position alone.

Training walks through epoch after epoch without a break. Sample number g belongs to epoch g // n and is the
(g mod n)-th of that epoch's permutation of the n samples. Step s of R processes with batches of B takes the
numbers from s R B on, of which process r takes the r-th part of B. So a run can start at any step with no
stored sampler state, and R processes with batches of B meet the samples that one with batches of R B meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """The sample numbers of one process.

    Attributes:
        batch_size: Samples per step and rank.
        rank: This process among `world_size`.
        world_size: Processes.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")
        check_rank(self.rank, self.world_size)

    def numbers(self, step: int) -> range:
        """The sample numbers of one step."""
        start = (step * self.world_size + self.rank) * self.batch_size
        return range(start, start + self.batch_size)


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a rank that is none."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of world_size {world_size}; expected 0 <= rank < world_size")


def shuffled(size: int, seed: int, epoch: int) -> Numbers:
    """A permutation of `size` samples."""
    return np.random.default_rng(order_seed(seed, epoch)).permutation(size)


def shuffled_blocks(sizes: Sequence[int], seed: int, epoch: int, buffer: int) -> Numbers:
    """A permutation of the samples of files of `sizes` that keeps those of a file near each other.

    The files come in shuffled order. Each sample then moves by less than `buffer` places: the one at place i
    is drawn a key, uniform from i to i + `buffer`, and the samples are sorted by their keys. That is what a
    shuffle buffer does to a stream, but known without reading anything.

    Returns:
        Indices into the files laid end to end, `[sum(sizes)]`.
    """
    generator = np.random.default_rng(order_seed(seed, epoch))
    total = sum(sizes)
    starts = np.cumsum([0, *sizes])
    stream = [np.arange(starts[file], starts[file + 1]) for file in generator.permutation(len(sizes))]
    keys = np.arange(total) + generator.uniform(0, buffer, total)
    places: Numbers = np.concatenate(stream)[np.argsort(keys, kind="stable")]
    return places


class SampleOrder:
    """Which image each sample number is; holds the permutation of one epoch at a time.

    Args:
        size: Images.
        seed: Of the permutations.
        blocks: Sizes of the files that hold the images, where those of a file should stay near each other.
        buffer: How far they may move then.
    """

    def __init__(self, size: int, seed: int, blocks: Sequence[int] | None = None, buffer: int = 1) -> None:
        self._size = size
        self._seed = seed
        self._blocks = blocks
        self._buffer = buffer
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._size

    def index(self, number: int) -> int:
        """The index of the image."""
        epoch, place = divmod(number, self._size)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self._permuted(epoch)
        return int(self._permutation[place])

    def _permuted(self, epoch: int) -> Numbers:
        if self._blocks is None:
            return shuffled(self._size, self._seed, epoch)
        return shuffled_blocks(self._blocks, self._seed, epoch, self._buffer)
