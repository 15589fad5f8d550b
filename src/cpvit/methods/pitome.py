"""PiToMe: "Accelerating Transformers with Spectrum-Preserving Token Merging", arXiv 2405.16148 (Tran et al.).

The *energy* of a token (Eq. 4 of the paper) is the mean over all tokens of ELU(cosine - margin): it is high for tokens
that are similar to many others. Tokens of high energy are merged, tokens of low energy are protected. As in the
authors' code for ViTs: the margin falls from 0.75 to 0 linearly with depth; in the first half of the blocks all tokens
are split alternately by rank of energy into sources and destinations, and the most similar pairs merge; in the second
half only the 2r tokens of highest energy are split, and every source merges; attention is not proportional to size.
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
    """Merging that protects tokens of low energy."""

    name = "pitome"
    evidence: EvidenceKind = "none"
    cumulative = False
    merges = True
    halves = True
    schedule = "constant-fraction"
    proportional = False

    def observe(self, state: TokenState, evidence: Tensor, num_prefix: int) -> TokenState:
        """Nothing is scored."""
        return state

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """Merge ``n - step.keep`` tokens of high energy into others of high energy."""
        keys = F.normalize(mean_keys(inputs, num_prefix), dim=-1)
        similarity = keys @ keys.transpose(1, 2)
        energy = F.elu(similarity - TOP_MARGIN * (1 - step.depth)).mean(dim=-1)
        by_energy = energy.argsort(dim=1, descending=True)
        match = _most_similar_pairs if step.depth < 0.5 else _highest_energy
        sources, destinations, kept = match(similarity, by_energy, state.positions.shape[1] - step.keep)
        return merge(x, state, sources, _index_in(kept, destinations), kept, num_prefix)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """Similarity of every token with every other."""
        return patches**2 * head_dim


def _most_similar_pairs(similarity: Tensor, by_energy: Tensor, removed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split all tokens by rank; the ``removed`` most similar pairs merge: sources, destinations [B r], kept [B k]."""
    first, second = by_energy[:, ::2], by_energy[:, 1::2]
    best = _between(similarity, first, second).max(dim=2)
    order = best.values.argsort(dim=1, descending=True)
    edges, unmerged = order[:, :removed], order[:, removed:]
    destinations = take(second, take(best.indices, edges))
    return take(first, edges), destinations, torch.cat([take(first, unmerged), second], dim=1)


def _highest_energy(similarity: Tensor, by_energy: Tensor, removed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split the 2r tokens of highest energy; every source merges: sources, destinations [B r], kept [B k]."""
    mergeable, protected = by_energy[:, : 2 * removed], by_energy[:, 2 * removed :]
    sources, candidates = mergeable[:, ::2], mergeable[:, 1::2]
    partner = _between(similarity, sources, candidates).argmax(dim=2)
    return sources, take(candidates, partner), torch.cat([protected, candidates], dim=1)


def _between(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows and columns of the similarities, for each image: [B n n], [B a], [B b] -> [B a b]."""
    chosen = take(similarity, rows)
    return chosen.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))


def _index_in(kept: Tensor, tokens: Tensor) -> Tensor:
    """Index of each of the tokens [B r] in ``kept`` [B k]: [B r]."""
    index = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    total = tokens.new_zeros(kept.shape[0], int(kept.shape[1] + tokens.shape[1]))
    return take(total.scatter(1, kept, index), tokens)
