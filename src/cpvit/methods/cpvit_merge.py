"""``cpvit-merge``, this project's own method: merge the pairs of tokens that are similar and of low importance.

CP-ViT scores how important a patch is and removes the others. ToMe measures how similar two patches are and averages
them, however important they are. Here the cost of merging token i into token j has both factors:

    cost(i, j) = (s_i * s_j) / (s_i + s_j) * (1 - cos(x_i, x_j)) * (a_i / s_i + a_j / s_j + floor)

* s: size, the number of patches a token stands for. The first factor is that of Ward's criterion: the increase of the
  squared distance between patches and the tokens that represent them, if tokens i and j are averaged.
* x: the token itself, between attention and MLP: the same vectors are compared and averaged.
* a: importance, the attention the class token pays to the token in this block, summed over heads, divided by its mean
  over the patch tokens (the mean attention received over all queries where there is no class token). Divided by the
  size: importance per patch.
* floor: importance of a patch that receives no attention.

Several sources may draw an edge to the same destination. Merged one after the other, cheapest first, the second finds
it grown; so the cost of an edge counts, with the destination, the sources whose edges to it are cheaper.

Pairs are matched as in ToMe (arXiv 2210.09461): tokens alternate between sources and destinations, each source draws an
edge to its most similar destination, and the edges of lowest cost are merged; attention is proportional to size. The
merged token has the direction of the size-weighted mean and the norm of the longest token in it (MLERP, arXiv
2312.01026). The shorter the mean was, the less its tokens agreed: the size shrinks by the root of it. The score needs
one query row, so the attention stays fused. If a block must merge more tokens than there are sources, the least
important tokens are each merged into the most similar token that stays.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cpvit.attention import AttentionInputs, EvidenceKind, replaced
from cpvit.core import BlockStep, TokenState, patch_score, take
from cpvit.methods.merging import as_dtype, initial_sizes, merge
from cpvit.methods.tome import best_edges, bipartite, merge_edges

FLOOR = 0.1


class CPViTMerge:
    """Merge along the edges of lowest cost. ``TokenState.score`` is the importance in the current block."""

    name = "cpvit-merge"
    evidence: EvidenceKind = "class"
    cumulative = False
    merges = True
    halves = False
    schedule = "curve"
    proportional = True

    def observe(self, state: TokenState, evidence: Tensor, num_prefix: int) -> TokenState:
        """Importance a: attention from the class token, divided by its mean over the patches: [B H N] -> [B n]."""
        score = patch_score(evidence, num_prefix)
        return replaced(state, score=score / score.mean(dim=1, keepdim=True))

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """Merge ``n - step.keep`` tokens: [B P+n C] -> [B P+step.keep C]."""
        assert state.score is not None
        if state.size is None:
            state = replaced(state, size=initial_sizes(x[:, num_prefix:]))
        tokens = state.positions.shape[1]
        if tokens - step.keep > tokens // 2:
            return _merge_least_important(x, state, step.keep, num_prefix)
        similarity, partner = best_edges(x[:, num_prefix:], num_prefix)
        cost = merge_cost(state, partner, similarity, num_prefix)
        return merge_edges(x, state, -cost, partner, step.keep, num_prefix, keep_length=True)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """Similarities (source by destination, or removed by kept), and the means of rescaled tokens."""
        sources, destinations = patches // 2, patches - patches // 2
        removed = patches - keep
        matching = sources * destinations if removed <= sources else removed * keep
        return (matching + removed * removed) * embed_dim


def merge_cost(state: TokenState, partner: Tensor, similarity: Tensor, num_prefix: int) -> Tensor:
    """Cost of merging every source into its partner, after the cheaper sources of the same partner: [B a].

    Args:
        state: With score and size of the n tokens.
        partner: [B a] index of each source's partner among the destinations.
        similarity: [B a] their cosine.
        num_prefix: P.
    """
    assert state.score is not None
    assert state.size is not None
    size_i, destination_size = bipartite(state.size, num_prefix)
    score_i, destination_score = bipartite(state.score, num_prefix)
    size_j, score_j = take(destination_size, partner), take(destination_score, partner)
    distance = (1 - as_dtype(score_i, similarity)).clamp_min(1e-6)
    alone = _pair_cost(size_i, score_i, size_j, score_j) * distance
    same = partner.unsqueeze(2) == partner.unsqueeze(1)
    before = same & (alone.unsqueeze(1) < alone.unsqueeze(2))
    cheaper = before.to(size_i.dtype)
    size_j = size_j + (cheaper * size_i.unsqueeze(1)).sum(dim=2)
    score_j = score_j + (cheaper * score_i.unsqueeze(1)).sum(dim=2)
    return _pair_cost(size_i, score_i, size_j, score_j) * distance


def _pair_cost(size_i: Tensor, score_i: Tensor, size_j: Tensor, score_j: Tensor) -> Tensor:
    """What a unit of distance costs between tokens of these sizes and importances: all [B a]."""
    return size_i * size_j / (size_i + size_j) * (score_i / size_i + score_j / size_j + FLOOR)


def _merge_least_important(
    x: Tensor, state: TokenState, keep: int, num_prefix: int
) -> tuple[Tensor, TokenState]:
    """Keep the ``keep`` tokens of highest importance; merge each other one into the most similar of them."""
    assert state.score is not None
    order = state.score.argsort(dim=1, descending=True)
    kept, sources = order[:, :keep].sort(dim=1).values, order[:, keep:]
    patches = F.normalize(x, dim=-1)
    similarity = take(patches, sources + num_prefix) @ take(patches, kept + num_prefix).transpose(1, 2)
    return merge(x, state, sources, similarity.argmax(dim=2), kept, num_prefix, keep_length=True)
