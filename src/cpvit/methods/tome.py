"""Token Merging: "Token Merging: Your ViT But Faster", arXiv 2210.09461 (Bolya et al.), written from the paper.

Bipartite soft matching (Sec. 3): the tokens are split alternately into set A (sources) and set B (destinations); each
token of A draws an edge to its most similar token of B (cosine of the keys, mean over heads); the r most similar edges
are merged. Attention is proportional (Eq. 3): the logarithm of a token's size is added to its logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpvit.attention import AttentionInputs, EvidenceKind
from cpvit.core import BlockStep, TokenState, take
from cpvit.methods.merging import mean_keys, merge


class ToMe:
    """Bipartite soft matching with proportional attention. It scores nothing, so the attention stays fused."""

    name = "tome"
    evidence: EvidenceKind = "none"
    cumulative = False
    merges = True
    halves = True
    schedule = "constant"
    proportional = True

    def observe(self, state: TokenState, evidence: Tensor, num_prefix: int) -> TokenState:
        """Nothing is scored."""
        return state

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """Merge along the ``n - step.keep`` most similar edges."""
        similarity, partner = best_edges(mean_keys(inputs, num_prefix), num_prefix)
        return merge_edges(x, state, similarity, partner, step.keep, num_prefix)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """Similarity of every token of set A with every token of set B."""
        return (patches // 2) * (patches - patches // 2) * head_dim


def bipartite(values: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Views of the two sets of the patch tokens: [B n ...] -> sources A [B a ...], destinations B [B b ...].

    They alternate by index in the sequence, prefix counted: even indices are in A, odd ones in B. Prefix tokens count
    for the index only; they are in neither set.
    """
    start = num_prefix % 2
    return values[:, start::2], values[:, 1 - start :: 2]


def best_edges(patches: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Most similar destination of every token of set A: [B n C] -> cosine [B a], index in set B [B a].

    Only set B is normalised before the product: the norm of a source does not change which destination is the most
    similar.
    """
    inverse_norm = torch.linalg.vector_norm(patches, dim=-1).clamp_min(1e-12).reciprocal()
    sources, destinations = bipartite(patches, num_prefix)
    source_inverse_norm, destination_inverse_norm = bipartite(inverse_norm, num_prefix)
    best = (sources @ (destinations * destination_inverse_norm.unsqueeze(-1)).transpose(1, 2)).max(dim=2)
    return best.values * source_inverse_norm, best.indices


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

    The new order is that of the paper's code: what is left of set A, then set B. ``keep_length`` as for
    :func:`cpvit.methods.merging.merge`.
    """
    tokens = state.positions.shape[1]
    removed = tokens - keep
    order = priority.argsort(dim=1, descending=True)
    edges, unmerged = order[:, :removed], order[:, removed:].sort(dim=1).values
    start = num_prefix % 2  # of set A, see bipartite
    destinations = torch.arange(1 - start, tokens, 2, device=x.device).expand(x.shape[0], -1)
    kept = torch.cat([2 * unmerged + start, destinations], dim=1)
    into = unmerged.shape[1] + take(partner, edges)
    return merge(x, state, 2 * edges + start, into, kept, num_prefix, keep_length=keep_length)
