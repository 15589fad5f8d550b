"""Images of a batch decoded by several threads: Pillow lets go of Python's lock while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Given = TypeVar("Given")
Made = TypeVar("Made")

MOST = 8
"""A bound, since a part of the work holds Python's lock. Measured with two: 1.5 to 2.2 times one thread."""


def decoding_threads() -> int:
    """How many threads decode here: as many as torch has, 1 in a loader's worker.

    On a CPU they and the threads of the model take turns, batch by batch. Processes that decode *beside* the model cost
    more than their work: whichever of the model's threads shares its core with one keeps all the others waiting.
    """
    return min(torch.get_num_threads(), MOST)


def side_by_side(make: Callable[[Given], Made], given: Iterable[Given]) -> list[Made]:
    """``make`` of each, in order, by :func:`decoding_threads` threads; the first error among them is raised.

    The threads live for this call alone, so that whoever calls can be forked and pickled.
    """
    threads = decoding_threads()
    if threads == 1:
        return [make(one) for one in given]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(make, given))
