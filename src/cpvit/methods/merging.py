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

    What leaves is added to the hosts' rows, so the many tokens that take none in are only copied. Whatever the guests
    of one host have in common comes from comparing guests with guests [B r r], never from reading back what was
    just added up: a compiler that fuses the two loops reads before all have arrived (seen with torch 2.15's inductor).
    """
    size = state.size if state.size is not None else ones_like_score(x[:, num_prefix:])
    host = take(staying, into)
    guests, hosts = take(x, leaving + num_prefix), take(x, host + num_prefix)
    together = into.unsqueeze(2) == into.unsqueeze(1)
    gone = take(size, leaving)
    share = gone / (take(size, host) + (together * gone.unsqueeze(1)).sum(dim=2))
    step = (guests - hosts) * share.unsqueeze(-1).to(x.dtype)
    if keep_length:
        step = _stretched(guests, hosts, step, together)
    merged = take_tokens(x, staying, num_prefix)
    rows = flat_rows(into + num_prefix, merged.shape[1])
    merged.flatten(0, 1).index_add_(0, rows, step.flatten(0, 1))
    return merged, state._replace(
        positions=take(state.positions, staying),
        score=None if state.score is None else take(state.score, staying),
        size=take(size, staying) + _received(gone, into, staying),
        carrier=_carriers(state, leaving, into, staying),
    )


def _received(gone: Tensor, into: Tensor, staying: Tensor) -> Tensor:
    """Patches that each of k staying tokens takes in: [B k]."""
    places = torch.arange(staying.shape[1], device=staying.device)
    return ((into.unsqueeze(1) == places.view(1, -1, 1)) * gone.unsqueeze(1)).sum(dim=2)


def _stretched(guests: Tensor, hosts: Tensor, step: Tensor, together: Tensor) -> Tensor:
    """Steps [B r C] that end, all guests of a host together, at their mean stretched to the longest of them."""
    means = hosts + together.to(step.dtype) @ step
    longest = torch.maximum(_length(hosts), (together * _length(guests).unsqueeze(1)).amax(dim=2))
    factor = longest / _length(means).clamp_min(1e-12)
    count = together.sum(dim=2).unsqueeze(-1)
    return (means * factor.unsqueeze(-1).to(means.dtype) - hosts) / count


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
