"""Which attention heads stay: by cumulative score (the cascade of the paper), or by what their loss costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor


def choose_heads(scores: Sequence[Sequence[float]], keep: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Heads kept in every block: the highest accumulated score, nested from block to block.

    D^l = D^(l-1) + T^l (arXiv 2203.04570): a head that is pruned in one block stays pruned in all later ones.

    Args:
        scores: T^l, one row of head scores per block; every block has the same number of heads.
        keep: How many heads each block keeps; must not rise.
    """
    totals = list(accumulate(scores, lambda total, block: [a + b for a, b in zip(total, block, strict=True)]))
    alive = list(range(len(scores[0])))
    chosen = []
    for total, count in zip(totals, keep, strict=True):
        alive = sorted(sorted(alive, key=lambda head: (-total[head], head))[:count])
        chosen.append(tuple(alive))
    return tuple(chosen)


def least_missed(losses: Mapping[tuple[int, int], float], share: float) -> tuple[tuple[int, ...], ...]:
    """Heads kept in every block when those go that are missed least; every block keeps one.

    Args:
        losses: (block, head) -> distance from the dense model without that head alone, for every head.
        share: Fraction of all heads to keep.
    """
    kept: dict[int, set[int]] = {}
    for block, head in losses:
        kept.setdefault(block, set()).add(head)
    going = len(losses) - round(share * len(losses))
    for block, head in sorted(losses, key=lambda place: (losses[place], place)):
        if going > 0 and len(kept[block]) > 1:
            kept[block].discard(head)
            going -= 1
    return tuple(tuple(sorted(kept[block])) for block in sorted(kept))


class HeadOutputs(NamedTuple):
    """Joined outputs of all heads of one block, over tokens and images: what its projection multiplies."""

    mean: Tensor
    """[H*D], float64."""
    covariance: Tensor
    """[H*D H*D], float64."""
