"""Attention heads: which ones go (cumulative score, cascade), and cutting them out of the weights.

A pruned head leaves Q, K, V and the projection physically: the matrices get smaller, so does the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from cpvit.adapters import HeadParameter, HostBlock


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


class SlicedHeads:
    """Undo record of one block: the parameters as they were before the cut."""

    def __init__(self, block: HostBlock, keep: Sequence[int]) -> None:
        self.block = block
        self.num_heads = block.num_heads
        self.originals: list[tuple[HeadParameter, Tensor]] = []
        for target in block.head_parameters():
            original = getattr(target.owner, target.name)
            self.originals.append((target, original))
            _replace(target, _cut(original, target, keep, self.num_heads))
        block.set_num_heads(len(keep))

    def restore(self) -> None:
        """Put the original parameters back, on the device and in the dtype the model has now."""
        for target, original in self.originals:
            now = getattr(target.owner, target.name)
            if original.device != now.device or original.dtype != now.dtype:
                original.data = original.data.to(now.device, now.dtype)
            _replace(target, original)
        self.block.set_num_heads(self.num_heads)


def _cut(tensor: Tensor, target: HeadParameter, keep: Sequence[int], heads: int) -> Tensor:
    index = head_index(keep, heads, target.groups, target.width).to(tensor.device)
    smaller = tensor.detach().index_select(target.dim, index)
    return nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller


def head_index(keep: Sequence[int], heads: int, groups: int, width: int) -> Tensor:
    """Rows that belong to the kept heads, in a dimension laid out as [groups, heads, width]."""
    return torch.arange(groups * heads * width).view(groups, heads, width)[:, list(keep)].flatten()


def _replace(target: HeadParameter, tensor: Tensor) -> None:
    setattr(target.owner, target.name, tensor)
    if isinstance(target.owner, nn.Linear) and target.name == "weight":
        target.owner.out_features, target.owner.in_features = tensor.shape
