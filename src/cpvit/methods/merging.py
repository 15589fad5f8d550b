"""What the merging methods share: similarity of tokens, and one token taking the place of several.

Legend: B images, H heads, P prefix tokens, n patch tokens, r of them leaving, k = n - r staying, D head
dimension, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpvit.attention import AttentionInputs
from cpvit.core import TokenState, accumulator_dtype, flat_rows, take, take_tokens


def mean_keys(inputs: AttentionInputs, num_prefix: int) -> Tensor:
    """Mean over heads of the keys of the patches: [B H P+n D] -> [B n D]; their cosine is ToMe's metric."""
    return inputs.key[:, :, num_prefix:].mean(dim=1)


def merge(
    x: Tensor,
    state: TokenState,
    leaving: Tensor,
    into: Tensor,
    staying: Tensor,
    num_prefix: int,
    *,
    keep_length: bool = False,
) -> tuple[Tensor, TokenState]:
    """Average every leaving patch token into one that stays, weighted by the patches each stands for.

    Args:
        x: [B P+n C].
        state: Of the n tokens; must track carriers.
        leaving: [B r] indices of the tokens that leave.
        into: [B r] for each of them, its place within ``staying``.
        staying: [B k] indices of the tokens that stay, in their new order.
        num_prefix: P.
        keep_length: Stretch each average to the length of the longest token in it (MLERP of "Token Fusion", arXiv
            2312.01026): the mean of tokens that differ is shorter than any of them, and blocks notice.

    Returns:
        [B P+k C] and the state of the k tokens.

    A token t that takes others in moves towards each by its share, x_t + sum of s_i / s_total (x_i - x_t): the
    weighted mean, and the many tokens that take none in are only copied.
    """
    size = state.size if state.size is not None else ones_like_score(x[:, num_prefix:])
    gone = take(size, leaving)
    total = take(size, staying).scatter_add(1, into, gone)
    merged = take_tokens(x, staying, num_prefix)
    share = (gone / take(total, into)).unsqueeze(-1).to(x.dtype)
    guests, hosts = take(x, leaving + num_prefix), take(merged, into + num_prefix)
    rows = flat_rows(into + num_prefix, merged.shape[1])
    merged.flatten(0, 1).index_add_(0, rows, ((guests - hosts) * share).flatten(0, 1))
    if keep_length:
        longest = torch.maximum(_length(guests), _length(hosts))
        stretch = _stretch(take(merged, into + num_prefix), longest, into, staying.shape[1])
        merged.flatten(0, 1).index_add_(0, rows, stretch.flatten(0, 1))
    return merged, state._replace(
        positions=take(state.positions, staying),
        score=None if state.score is None else take(state.score, staying),
        size=total,
        carrier=_carriers(state, leaving, into, staying),
    )


def _stretch(means: Tensor, longest: Tensor, into: Tensor, staying: int) -> Tensor:
    """What each of r guests adds to its host's mean [B r C], so that all of a host's guests together stretch it."""
    places = longest.new_zeros(longest.shape[0], staying)
    target = take(places.scatter_reduce(1, into, longest, "amax", include_self=False), into)
    guests = take(places.scatter_add(1, into, torch.ones_like(longest)), into)
    factor = (target / _length(means).clamp_min(1e-12) - 1) / guests
    return means * factor.unsqueeze(-1).to(means.dtype)


def _length(tokens: Tensor) -> Tensor:
    """[B r C] -> [B r], at least float32."""
    return torch.linalg.vector_norm(tokens, dim=-1, dtype=accumulator_dtype(tokens))


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
