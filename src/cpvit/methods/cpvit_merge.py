"""``cpvit-merge``, this project's own method: merge where it does least harm, judged by informativeness.

CP-ViT asks how informative a patch is and throws the others away; ToMe asks how alike two patches are and
averages them, however informative. Here the price of merging token i into j is both at once:

    price(i, j) = (s_i * s_j) / (s_i + s_j) * (1 - cos(x_i, x_j)) * (a_i / s_i + a_j / s_j + floor)

* s: patches a token stands for. The first factor is Ward's criterion: what averaging adds to the squared
  distance between the patches and the tokens that carry them.
* x: the token itself, between attention and MLP: what is averaged is what is compared.
* a: informativeness, the attention the class token pays in this block over its mean over the patches (the mean
  attention received where there is no class token). Per patch of the token, hence a / s.
* floor: what a patch is worth that nobody looks at.

Pairs are sought as in ToMe (arXiv 2210.09461): tokens alternate between two sides, each of the first draws an
edge to its cheapest partner, the cheapest edges merge; attention is proportional to size. The merged token points
where the weighted mean points and is as long as the longest token in it (arXiv 2312.01026). Everything is scored
from one query row, so the attention stays fused. If more than one side must go at once, the least informative
tokens merge into the likest that stay.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cpvit.attention import AttentionInputs, EvidenceKind
from cpvit.core import BlockStep, TokenState, patch_score, take
from cpvit.methods.merging import merge, ones_like_score
from cpvit.methods.tome import best_edges, merge_edges, sides

FLOOR = 0.1


class CPViTMerge:
    """Merge along the edges of lowest price."""

    name = "cpvit-merge"
    evidence: EvidenceKind = "class"
    cumulative = False
    merges = True
    halves = False
    schedule = "constant"
    proportional = True

    def observe(self, state: TokenState, evidence: Tensor, num_prefix: int) -> TokenState:
        """a: this block's attention from the class token, over its mean: [B H N] -> [B n]."""
        score = patch_score(evidence, num_prefix)
        return state._replace(score=score / score.mean(dim=1, keepdim=True))

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """Merge ``n - step.keep`` tokens: [B P+n C] -> [B P+step.keep C]."""
        assert state.score is not None
        if state.size is None:
            state = state._replace(size=ones_like_score(x[:, num_prefix:]))
        tokens = state.positions.shape[1]
        if tokens - step.keep > tokens // 2:
            return _merge_least_informative(x, state, step.keep, num_prefix)
        likeness, partner = best_edges(x[:, num_prefix:], num_prefix)
        price = merge_price(state, partner, likeness, num_prefix)
        return merge_edges(x, state, -price, partner, step.keep, num_prefix, keep_length=True)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """Every token of one side with every token of the other, or all that leave with all that stay; the means."""
        first, second = patches // 2, patches - patches // 2
        removed = patches - keep
        matching = first * second if removed <= first else removed * keep
        return (matching + removed * removed) * embed_dim


def merge_price(state: TokenState, partner: Tensor, likeness: Tensor, num_prefix: int) -> Tensor:
    """Price of merging the first side into its partners [B a], places in the second; likeness: cosine. [B a]."""
    assert state.score is not None
    assert state.size is not None
    size_i, size_second = sides(state.size, num_prefix)
    score_i, score_second = sides(state.score, num_prefix)
    size_j, score_j = take(size_second, partner), take(score_second, partner)
    worth = score_i / size_i + score_j / size_j + FLOOR
    distance = (1 - likeness.to(worth.dtype)).clamp_min(1e-6)
    return size_i * size_j / (size_i + size_j) * distance * worth


def _merge_least_informative(
    x: Tensor, state: TokenState, keep: int, num_prefix: int
) -> tuple[Tensor, TokenState]:
    assert state.score is not None
    order = state.score.argsort(dim=1, descending=True)
    staying, leaving = order[:, :keep].sort(dim=1).values, order[:, keep:]
    patches = F.normalize(x, dim=-1)
    likeness = take(patches, leaving + num_prefix) @ take(patches, staying + num_prefix).transpose(1, 2)
    return merge(x, state, leaving, likeness.argmax(dim=2), staying, num_prefix, keep_length=True)
