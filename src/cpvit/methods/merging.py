"""What the merging methods share: the keys to compare tokens by, and averaging source tokens into destinations.

Legend: B images, H heads, P prefix tokens, n patch tokens, r sources (merged into another token), k = n - r kept
tokens, D head dimension, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from cpvit.attention import AttentionInputs, replaced
from cpvit.core import TokenState, accumulator_dtype, first_rows, take, take_each, with_prefix

INDEX_ADD_IS_WRONG = torch.__version__ < TorchVersion("2.8")
"""The inductor of torch 2.5 loses additions to repeated rows on a CPU; seen there, and right in 2.14."""


def mean_keys(inputs: AttentionInputs, num_prefix: int) -> Tensor:
    """Mean over heads of the patches' keys: [B H P+n D] -> [B n D]. ToMe compares tokens by their cosine."""
    return inputs.key[:, :, num_prefix:].mean(dim=1)


def merge(
    x: Tensor,
    state: TokenState,
    sources: Tensor,
    destinations: Tensor,
    kept: Tensor,
    num_prefix: int,
    *,
    keep_length: bool = False,
) -> tuple[Tensor, TokenState]:
    """Average every source token into its destination, weighted by the patches each token stands for.

    Args:
        x: [B P+n C].
        state: Of the n patch tokens.
        sources: [B r] indices of the tokens to merge away.
        destinations: [B r] for each source, the index within ``kept`` of the token it is merged into.
        kept: [B k] indices of the tokens that stay, in their new order.
        num_prefix: P.
        keep_length: Scale each average to the norm of the longest token in it (MLERP of "Token Fusion", arXiv
            2312.01026). The mean of tokens that differ is shorter than each of them, which later blocks were not
            trained for. The size of the merged token is then the number of patches times the root of what the mean
            was shorter by.

    Returns:
        [B P+k C] and the state of the k tokens.

    Only the rows of destinations are written (``index_add_``); all other kept tokens are copied. What the sources of
    one destination have in common is computed by comparing sources with sources [B r r], never by reading the summed
    rows back: a compiler that fuses the two loops reads them before all sources were added (seen with the inductor of
    torch 2.15).
    """
    size = state.size if state.size is not None else initial_sizes(x[:, num_prefix:])
    destination = take(kept, destinations)
    source_tokens, destination_tokens, tokens = take_each(
        x, sources + num_prefix, destination + num_prefix, with_prefix(kept, num_prefix)
    )
    same = destinations.unsqueeze(2) == destinations.unsqueeze(1)
    source_size = take(size, sources)
    destination_size = take(size, destination)
    total = destination_size + (same * source_size.unsqueeze(1)).sum(dim=2)
    step = (source_tokens - destination_tokens) * as_dtype(x, (source_size / total).unsqueeze(-1))
    gained = source_size
    if keep_length:
        step, shortening = _rescaled(source_tokens, destination_tokens, step, same)
        gained = (total * shortening.sqrt() - destination_size) / same.sum(dim=2)
    merged = _added(tokens, step, destinations + num_prefix)
    grown = _added(take(size, kept).unsqueeze(2), gained.unsqueeze(2), destinations).squeeze(2)
    return merged, replaced(
        state,
        positions=take(state.positions, kept),
        score=None if state.score is None else take(state.score, kept),
        size=grown,
        carrier=_carriers(state, sources, destinations, kept),
    )


def _added(tokens: Tensor, step: Tensor, rows: Tensor) -> Tensor:
    """Add each step [B r C] to its row [B r] of the tokens [B N C]; rows may repeat."""
    if INDEX_ADD_IS_WRONG and torch.compiler.is_compiling():
        places = torch.arange(tokens.shape[1], device=tokens.device).view(1, -1, 1)
        return tokens + (rows.unsqueeze(1) == places).to(step.dtype) @ step
    first = first_rows(tokens)
    flat = (rows if first is None else rows + first).flatten()
    tokens.flatten(0, 1).index_add_(0, flat, step.flatten(0, 1))
    return tokens


def _rescaled(
    source_tokens: Tensor, destination_tokens: Tensor, step: Tensor, same: Tensor
) -> tuple[Tensor, Tensor]:
    """Steps [B r C] whose sum over the sources of one destination leads to their rescaled mean.

    Also the length of the mean over that of the longest token, at most 1 up to rounding: [B r].

    ``same`` [B r r] says which sources share a destination. The sources of one destination get equal steps.
    """
    means = destination_tokens + same.to(step.dtype) @ step
    longest = torch.maximum(_norm(destination_tokens), (same * _norm(source_tokens).unsqueeze(1)).amax(dim=2))
    length = _norm(means).clamp_min(1e-12)
    count = same.sum(dim=2).unsqueeze(-1)
    step = (means * as_dtype(means, (longest / length).unsqueeze(-1)) - destination_tokens) / count
    return step, length / longest.clamp_min(1e-12)


def _norm(tokens: Tensor) -> Tensor:
    """[B r C] -> [B r], at least float32."""
    return torch.linalg.vector_norm(tokens, dim=-1, dtype=accumulator_dtype(tokens))


def as_dtype(like: Tensor, values: Tensor) -> Tensor:
    """In the dtype of another tensor. Where it is that already, a traced graph gets no operation for it."""
    return values if values.dtype == like.dtype else values.to(like.dtype)


def initial_sizes(patches: Tensor) -> Tensor:
    """Token sizes before any merge, all 1: [B n C] -> [B n], at least float32."""
    return torch.ones(patches.shape[:2], dtype=accumulator_dtype(patches), device=patches.device)


def _carriers(state: TokenState, sources: Tensor, destinations: Tensor, kept: Tensor) -> Tensor | None:
    """Old token index of every patch -> new token index: [B N0]."""
    if state.carrier is None:
        return None
    tokens = state.positions.shape[1]
    index = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    new_index = (
        kept.new_zeros(kept.shape[0], tokens).scatter(1, kept, index).scatter(1, sources, destinations)
    )
    return take(new_index, state.carrier)
