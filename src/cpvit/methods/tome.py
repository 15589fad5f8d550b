"""Token Merging: "Token Merging: Your ViT But Faster", arXiv 2210.09461 (Bolya et al.), from the paper.

Tokens are dealt alternately into two sets by their place in the sequence; each of the first set draws an edge
to its most similar one of the second (cosine of the mean key); the strongest edges are merged. Attention is
proportional: the logarithm of a token's size is added to its logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpvit.attention import AttentionInputs, EvidenceKind
from cpvit.core import BlockStep, TokenState, take
from cpvit.methods.merging import mean_keys, merge


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
        similarity, partner = best_edges(mean_keys(inputs, num_prefix), num_prefix)
        return merge_edges(x, state, similarity, partner, step.keep, num_prefix)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """Every token of one side with every token of the other."""
        return (patches // 2) * (patches - patches // 2) * head_dim


def sides(values: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Views of the two sides of the patch tokens: [B n ...] -> first [B a ...], second [B b ...].

    They alternate by place in the sequence, prefix counted: even places first, odd places second.
    Prefix tokens take part in the dealing and in nothing else.
    """
    start = num_prefix % 2
    return values[:, start::2], values[:, 1 - start :: 2]


def best_edges(patches: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Likest partner of every token of the first side: [B n C] -> cosine, place in the second side [B a].

    The length of a token of the first side does not change which partner is the likest.
    """
    shrink = torch.linalg.vector_norm(patches, dim=-1).clamp_min(1e-12).reciprocal()
    first, second = sides(patches, num_prefix)
    shrink_first, shrink_second = sides(shrink, num_prefix)
    best = (first @ (second * shrink_second.unsqueeze(-1)).transpose(1, 2)).max(dim=2)
    return best.values * shrink_first, best.indices


def merge_edges(
    x: Tensor,
    state: TokenState,
    priority: Tensor,
    partner: Tensor,
    keep: int,
    num_prefix: int,
    *,
    keep_length: bool = False,
) -> tuple[Tensor, TokenState]:
    """Merge along the edges of highest priority [B a] until ``keep`` tokens are left.

    The new order is that of the paper's code: what stays of the first side, then the second side.
    ``keep_length`` as for :func:`cpvit.methods.merging.merge`.
    """
    tokens = state.positions.shape[1]
    removed = tokens - keep
    order = priority.argsort(dim=1, descending=True)
    edges, rest = order[:, :removed], order[:, removed:].sort(dim=1).values
    first, second = sides(torch.arange(tokens, device=x.device).expand(x.shape[0], tokens), num_prefix)
    staying = torch.cat([take(first, rest), second], dim=1)
    into = rest.shape[1] + take(partner, edges)
    return merge(x, state, take(first, edges), into, staying, num_prefix, keep_length=keep_length)
