"""PiToMe: "Accelerating Transformers with Spectrum-Preserving Token Merging", arXiv 2405.16148 (Tran et al.).

A token's *energy* (Eq. 4 of the paper) is the mean, over all tokens, of ELU(cosine - margin): high for tokens
with many likenesses. Tokens of high energy are merged, tokens of low energy are protected. As in the authors'
code for ViTs: the margin falls from 0.75 linearly with depth; in the first half of the blocks all tokens are
dealt into two sides by the rank of their energy and the most similar pairs merge; in the second half only the
2r tokens of highest energy are dealt, and every one of the first side merges; attention is not proportional.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cpvit.attention import AttentionInputs, EvidenceKind
from cpvit.core import BlockStep, TokenState, take
from cpvit.methods.merging import mean_keys, merge

TOP_MARGIN = 0.75


class PiToMe:
    """Energy-protected merging."""

    name = "pitome"
    evidence: EvidenceKind = "none"
    cumulative = False
    merges = True
    halves = True
    schedule = "constant-fraction"
    proportional = False

    def observe(self, state: TokenState, evidence: Tensor, num_prefix: int) -> TokenState:
        """Nothing to account for."""
        return state

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """Merge ``n - step.keep`` tokens into others of high energy."""
        keys = F.normalize(mean_keys(inputs, num_prefix), dim=-1)
        similarity = keys @ keys.transpose(1, 2)
        energy = F.elu(similarity - TOP_MARGIN * (1 - step.depth)).mean(dim=-1)
        by_energy = energy.argsort(dim=1, descending=True)
        pair = _strongest_pairs if step.depth < 0.5 else _highest_energy
        leaving, target, staying = pair(similarity, by_energy, state.positions.shape[1] - step.keep)
        return merge(x, state, leaving, _places(target, staying), staying, num_prefix)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """Every token with every other."""
        return patches**2 * head_dim


def _strongest_pairs(similarity: Tensor, by_energy: Tensor, removed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Deal all tokens by rank; the ``removed`` most similar pairs merge: leaving, target [B r], staying [B k]."""
    first, second = by_energy[:, ::2], by_energy[:, 1::2]
    best = _between(similarity, first, second).max(dim=2)
    order = best.values.argsort(dim=1, descending=True)
    edges, rest = order[:, :removed], order[:, removed:]
    target = take(second, take(best.indices, edges))
    return take(first, edges), target, torch.cat([take(first, rest), second], dim=1)


def _highest_energy(similarity: Tensor, by_energy: Tensor, removed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Deal the 2r tokens of highest energy; each of the first side merges: leaving, target [B r], staying [B k]."""
    mergeable, protected = by_energy[:, : 2 * removed], by_energy[:, 2 * removed :]
    first, second = mergeable[:, ::2], mergeable[:, 1::2]
    partner = _between(similarity, first, second).argmax(dim=2)
    return first, take(second, partner), torch.cat([protected, second], dim=1)


def _between(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Similarity of the chosen tokens: [B n n], [B a], [B b] -> [B a b]."""
    chosen = take(similarity, rows)
    return chosen.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))


def _places(target: Tensor, staying: Tensor) -> Tensor:
    """Where each target token stands among those that stay: [B r], [B k] -> [B r]."""
    places = torch.arange(staying.shape[1], device=staying.device).expand_as(staying)
    total = target.new_zeros(staying.shape[0], int(staying.shape[1] + target.shape[1]))
    return take(total.scatter(1, staying, places), target)
