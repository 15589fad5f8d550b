"""What the merging methods share: similarity of tokens, and one token taking the place of several.

Legend: B images, H heads, P prefix tokens, n patch tokens, r of them leaving, k = n - r staying, D head
dimension, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cpvit.attention import AttentionInputs
from cpvit.core import TokenState, accumulator_dtype, take


def patch_keys(inputs: AttentionInputs, num_prefix: int) -> Tensor:
    """Unit-length mean over heads of the keys of the patches: [B H P+n D] -> [B n D] (ToMe's metric)."""
    return F.normalize(inputs.key[:, :, num_prefix:].mean(dim=1), dim=-1)


def merge(
    x: Tensor, state: TokenState, leaving: Tensor, into: Tensor, staying: Tensor, num_prefix: int
) -> tuple[Tensor, TokenState]:
    """Average every leaving patch token into one that stays, weighted by the patches each stands for.

    Args:
        x: [B P+n C].
        state: Of the n tokens; must track carriers.
        leaving: [B r] indices of the tokens that leave.
        into: [B r] for each of them, its place within ``staying``.
        staying: [B k] indices of the tokens that stay, in their new order.
        num_prefix: P.

    Returns:
        [B P+k C] and the state of the k tokens.
    """
    patches = x[:, num_prefix:]
    size = state.size if state.size is not None else ones_like_score(patches)
    weight = size.unsqueeze(-1)
    total = take(size, staying).scatter_add(1, into, take(size, leaving))
    weighted = patches * weight.to(patches.dtype)
    mixed = take(weighted, staying).scatter_add(
        1, into.unsqueeze(-1).expand(*into.shape, x.shape[2]), take(weighted, leaving)
    )
    merged = mixed / total.unsqueeze(-1).to(patches.dtype)
    return torch.cat([x[:, :num_prefix], merged], dim=1), state._replace(
        positions=take(state.positions, staying),
        score=None if state.score is None else take(state.score, staying),
        size=total,
        carrier=_carriers(state, leaving, into, staying),
    )


def ones_like_score(patches: Tensor) -> Tensor:
    """Sizes before anything was merged: [B n C] -> [B n], at least float32."""
    return torch.ones(patches.shape[:2], dtype=accumulator_dtype(patches), device=patches.device)


def _carriers(state: TokenState, leaving: Tensor, into: Tensor, staying: Tensor) -> Tensor | None:
    if state.carrier is None:
        return None
    tokens = state.positions.shape[1]
    places = torch.arange(staying.shape[1], device=staying.device).expand_as(staying)
    row = staying.new_zeros(staying.shape[0], tokens).scatter(1, staying, places).scatter(1, leaving, into)
    return take(row, state.carrier)
