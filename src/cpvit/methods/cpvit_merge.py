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
edge to its cheapest partner, the cheapest edges merge; attention is proportional to size. Everything is scored
from one query row, so the attention stays fused. If more than one side must go at once, the least informative
tokens merge into the likest that stay.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cpvit.attention import AttentionInputs, EvidenceKind
from cpvit.core import BlockStep, TokenState, patch_score, take
from cpvit.methods.merging import merge, ones_like_score
from cpvit.methods.tome import deal, merge_edges

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
        patches = F.normalize(x[:, num_prefix:], dim=-1)
        if state.size is None:
            state = state._replace(size=ones_like_score(patches))
        sides = deal(patches.shape[1], num_prefix, x.device)
        if patches.shape[1] - step.keep > patches.shape[1] // 2:
            return _merge_least_informative(x, state, patches, step.keep, num_prefix)
        likeness = patches[:, sides.first] @ patches[:, sides.second].transpose(1, 2)
        best = likeness.max(dim=2)
        price = merge_price(state, sides.first, take_from(sides.second, best.indices), best.values)
        return merge_edges(x, state, sides, -price, best.indices, step.keep, num_prefix)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """Every token of one side with every token of the other, or all that leave with all that stay."""
        first, second = patches // 2, patches - patches // 2
        removed = patches - keep
        return (first * second if removed <= first else removed * keep) * embed_dim


def merge_price(state: TokenState, first: Tensor, partner: Tensor, likeness: Tensor) -> Tensor:
    """Price of merging tokens ``first`` [a] into ``partner`` [B a], whose cosine is ``likeness``: [B a]."""
    assert state.score is not None
    assert state.size is not None
    size_i, size_j = state.size[:, first], take(state.size, partner)
    worth = state.score[:, first] / size_i + take(state.score, partner) / size_j + FLOOR
    distance = (1 - likeness.to(worth.dtype)).clamp_min(1e-6)
    return size_i * size_j / (size_i + size_j) * distance * worth


def take_from(index: Tensor, places: Tensor) -> Tensor:
    """Look places [B a] up in one index for all images [b]: [B a]."""
    return index[places]


def _merge_least_informative(
    x: Tensor, state: TokenState, patches: Tensor, keep: int, num_prefix: int
) -> tuple[Tensor, TokenState]:
    assert state.score is not None
    order = state.score.argsort(dim=1, descending=True)
    staying, leaving = order[:, :keep].sort(dim=1).values, order[:, keep:]
    into = (take(patches, leaving) @ take(patches, staying).transpose(1, 2)).argmax(dim=2)
    return merge(x, state, leaving, into, staying, num_prefix)
