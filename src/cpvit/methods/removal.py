"""Baselines that remove tokens by the score of the current block alone.

* EViT: "Not All Patches are What You Need", arXiv 2202.07800 (Liang et al.): keep the patches the class token
  attends to most (mean over heads); fuse the others into one token, weighted by that attention (Sec. 3.3).
* Top-K: the same score without the fused token, as in "Which Tokens to Use?", arXiv 2308.04657.
* Random: a fixed random choice, the lower bound for every score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpvit.attention import AttentionInputs, EvidenceKind, replaced
from cpvit.core import BlockStep, TokenState, highest, patch_score, remove, take, take_tokens


class TopK:
    """Keep the patches with the highest class-token attention (mean attention where there is no class token)."""

    evidence: EvidenceKind = "class"
    cumulative = False
    merges = False
    halves = False
    schedule = "stages"
    proportional = False

    def __init__(self, name: str = "topk") -> None:
        self.name = name

    def observe(self, state: TokenState, evidence: Tensor, num_prefix: int) -> TokenState:
        """Replace the score by this block's attention."""
        return replaced(state, score=patch_score(evidence, num_prefix))

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """Keep the ``step.keep`` patches of highest score."""
        assert state.score is not None
        return remove(x, state, highest(state.score, step.keep), num_prefix)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """0: removal needs no multiplications."""
        return 0


class EViT(TopK):
    """Keep one patch fewer, and fuse all removed patches into one token."""

    merges = True

    def __init__(self) -> None:
        super().__init__("evit")

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """The ``step.keep - 1`` patches of highest score, then the fused token: [B P+n C] -> [B P+step.keep C]."""
        assert state.score is not None
        order = state.score.argsort(dim=1, descending=True)
        kept, fused = order[:, : step.keep - 1].sort(dim=1).values, order[:, step.keep - 1 :]
        score = take(state.score, fused)
        weight = (score / score.sum(dim=1, keepdim=True)).to(x.dtype)
        rows = torch.cat([kept, fused[:, :1]], dim=1)
        reduced = take_tokens(x, rows, num_prefix)
        reduced[:, -1:] = weight.unsqueeze(1) @ take(x, fused + num_prefix)
        return reduced, replaced(
            state, positions=take(state.positions, rows), score=None, carrier=_carriers(state, kept)
        )

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """The weighted sum that makes the fused token."""
        return (patches - keep + 1) * embed_dim


def _carriers(state: TokenState, kept: Tensor) -> Tensor | None:
    """New token index of every patch, [B N0]; that of the fused token is the last one."""
    if state.carrier is None:
        return None
    index = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    new_index = torch.full_like(state.positions, kept.shape[1]).scatter(1, kept, index)
    return take(new_index, state.carrier)


class Random:
    """Remove patches by a fixed random order of their positions, the same for every image."""

    name = "random"
    evidence: EvidenceKind = "none"
    cumulative = False
    merges = False
    halves = False
    schedule = "auto"
    proportional = False
    seed = 0

    def observe(self, state: TokenState, evidence: Tensor, num_prefix: int) -> TokenState:
        """Nothing is scored."""
        return state

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """Keep the ``step.keep`` patches that come first in the random order."""
        return remove(x, state, highest(scramble(state.positions, self.seed), step.keep), num_prefix)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """0: removal needs no multiplications."""
        return 0


def scramble(positions: Tensor, seed: int) -> Tensor:
    """A pseudo-random number in [0, 1) for each position: [B n] -> [B n].

    The fractional part of a scaled sine. It needs no generator, so it compiles and exports.
    """
    value = torch.sin(positions.double() * 12.9898 + (seed + 1) * 78.233) * 43758.5453
    return value - value.floor()
