"""Token Merging: "Token Merging: Your ViT But Faster", arXiv 2210.09461 (Bolya et al.), from the paper.

Tokens are dealt alternately into two sets by their place in the sequence; each of the first set draws an edge
to its most similar one of the second (cosine of the mean key); the strongest edges are merged. Attention is
proportional: the logarithm of a token's size is added to its logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpvit.attention import AttentionInputs, EvidenceKind
from cpvit.core import BlockStep, TokenState, take
from cpvit.methods.merging import merge, patch_keys


class ToMe:
    """Bipartite soft matching with proportional attention; needs no score."""

    name = "tome"
    evidence: EvidenceKind = "none"
    cumulative = False
    merges = True
    halves = True
    schedule = "constant"
    proportional = True

    def observe(self, state: TokenState, evidence: Tensor, num_prefix: int) -> TokenState:
        """Nothing to account for."""
        return state

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """Merge the ``n - step.keep`` strongest edges."""
        sides = deal(state.positions.shape[1], num_prefix, x.device)
        similarity, partner = best_edges(patch_keys(inputs, num_prefix), sides)
        return merge_edges(x, state, sides, similarity, partner, step.keep, num_prefix)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """Every token of one side with every token of the other."""
        return (patches // 2) * (patches - patches // 2) * head_dim


class Sides(NamedTuple):
    """Indices of the patch tokens of each side."""

    first: Tensor
    second: Tensor


def deal(patches: int, num_prefix: int, device: torch.device) -> Sides:
    """Alternate by place in the sequence, prefix counted: even places first, odd places second.

    Prefix tokens take part in the dealing and in nothing else.
    """
    index = torch.arange(patches, device=device)
    start = num_prefix % 2
    return Sides(index[start::2], index[1 - start :: 2])


def best_edges(keys: Tensor, sides: Sides) -> tuple[Tensor, Tensor]:
    """Most similar partner of every token of the first side: keys [B n D] -> similarity, partner [B a]."""
    best = (keys[:, sides.first] @ keys[:, sides.second].transpose(1, 2)).max(dim=2)
    return best.values, best.indices


def merge_edges(
    x: Tensor,
    state: TokenState,
    sides: Sides,
    priority: Tensor,
    partner: Tensor,
    keep: int,
    num_prefix: int,
) -> tuple[Tensor, TokenState]:
    """Merge along the edges of highest priority [B a] until ``keep`` tokens are left.

    The new order is that of the paper's code: what stays of the first side, then the second side.
    """
    removed = state.positions.shape[1] - keep
    order = priority.argsort(dim=1, descending=True)
    edges, rest = order[:, :removed], order[:, removed:].sort(dim=1).values
    second = sides.second.expand(x.shape[0], -1)
    staying = torch.cat([sides.first[rest], second], dim=1)
    into = rest.shape[1] + take(partner, edges)
    return merge(x, state, sides.first[edges], into, staying, num_prefix)
