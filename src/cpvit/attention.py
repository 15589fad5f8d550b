"""Attention of one block: fused wherever no score is needed, and the evidence where one is.

Legend: B images, H heads, N tokens, D head dimension. Rows of the attention are queries, columns are keys.

Three routes compute the same output:

* *fused*: ``scaled_dot_product_attention``; nothing of the N x N matrix is seen;
* *explicit*: the matrix is built, a few images at a time on a CPU so that it stays in the cache;
* *class row*: fused output, and one extra query row for the attention of the class token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

EvidenceKind: TypeAlias = Literal["none", "max", "class"]

CHUNK_BYTES = 1 << 20
"""Attention matrix built at once on a CPU: about what a core's own cache holds."""


class AttentionInputs(NamedTuple):
    """What a host's block feeds to its attention."""

    query: Tensor
    """[B H N D], rotated or normalised as the host does."""
    key: Tensor
    """[B H N D]."""
    value: Tensor
    """[B H N D]."""
    scale: float
    """Factor of query @ key."""
    bias: Tensor | None = None
    """Added to the logits; broadcasts to [B H N N]."""
    gate: Tensor | None = None
    """What the host multiplies the attention output with; [B N H*D]."""
    dropout: float = 0.0
    """Probability of dropping an attention weight (training only)."""


class Attended(NamedTuple):
    """Result of one attention."""

    out: Tensor
    """[B H N D]."""
    evidence: Tensor | None = None
    """[B H N]: "max": strongest attention any query pays each key; "class": what the class token pays."""
    probs: Tensor | None = None
    """[B H N N] attention probabilities, only when watched."""


def attend(
    inputs: AttentionInputs,
    *,
    sizes: Tensor | None = None,
    evidence: EvidenceKind = "none",
    num_prefix: int = 1,
    watch: bool = False,
) -> Attended:
    """Attention output and, where asked for, the evidence of every token.

    Args:
        inputs: Query, key, value of the block.
        sizes: [B N] patches behind each token; its logarithm is added to the logits, so that a merged token
            weighs as much as the patches in it (proportional attention, ToMe, arXiv 2210.09461, Eq. 3).
        evidence: What to score by; "none" keeps the attention fused.
        num_prefix: Prefix tokens; without any, "class" evidence is the mean over all queries.
        watch: Also return the probabilities.
    """
    inputs = inputs if sizes is None else inputs._replace(bias=_with_log_sizes(inputs, sizes))
    if watch:
        return _explicit(inputs, evidence, num_prefix, keep_probs=True)
    if evidence == "none":
        return Attended(_fused(inputs))
    if evidence == "class" and num_prefix:
        return Attended(_fused(inputs), _class_row(inputs))
    return _explicit_in_chunks(inputs, evidence, num_prefix)


def _with_log_sizes(inputs: AttentionInputs, sizes: Tensor) -> Tensor:
    log_sizes = sizes.log().to(inputs.query.dtype)[:, None, None, :]
    return log_sizes if inputs.bias is None else inputs.bias + log_sizes


def _fused(inputs: AttentionInputs) -> Tensor:
    return F.scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        attn_mask=inputs.bias,
        dropout_p=inputs.dropout,
        scale=inputs.scale,
    )


def _probabilities(inputs: AttentionInputs, query: Tensor) -> Tensor:
    logits = (query * inputs.scale) @ inputs.key.transpose(-2, -1)
    if inputs.bias is not None:
        logits = logits + inputs.bias
    return logits.softmax(dim=-1)


def _class_row(inputs: AttentionInputs) -> Tensor:
    """Attention the class token (row 0) pays to every token: [B H N]."""
    first = inputs if inputs.bias is None else inputs._replace(bias=inputs.bias[..., :1, :])
    return _probabilities(first, inputs.query[:, :, :1]).squeeze(2)


def _explicit(
    inputs: AttentionInputs, evidence: EvidenceKind, num_prefix: int, *, keep_probs: bool
) -> Attended:
    probs = _probabilities(inputs, inputs.query)
    out = F.dropout(probs, inputs.dropout) if inputs.dropout else probs
    return Attended(out @ inputs.value, _evidence(probs, evidence, num_prefix), probs if keep_probs else None)


def _evidence(probs: Tensor, kind: EvidenceKind, num_prefix: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "max":
        return probs.amax(dim=-2)
    return probs[:, :, 0] if num_prefix else probs.mean(dim=-2)


def _explicit_in_chunks(inputs: AttentionInputs, evidence: EvidenceKind, num_prefix: int) -> Attended:
    """The explicit route, a few images at a time where that helps (CPU, eager)."""
    images = _images_per_chunk(inputs.query)
    if images is None:
        return _explicit(inputs, evidence, num_prefix, keep_probs=False)
    pieces = [
        _explicit(part, evidence, num_prefix, keep_probs=False) for part in _split_batch(inputs, images)
    ]
    out = torch.cat([piece.out for piece in pieces])
    return Attended(out, torch.cat([piece.evidence for piece in pieces if piece.evidence is not None]))


def _images_per_chunk(query: Tensor) -> int | None:
    """How many images' matrices fit the cache; None to do all at once (GPU, compiled, exported, small)."""
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    batch, heads, tokens, _ = query.shape
    images = max(1, CHUNK_BYTES // (heads * tokens * tokens * query.element_size()))
    return images if images < batch else None


def _split_batch(inputs: AttentionInputs, images: int) -> list[AttentionInputs]:
    batch = inputs.query.shape[0]
    return [_slice_batch(inputs, slice(start, start + images)) for start in range(0, batch, images)]


def _slice_batch(inputs: AttentionInputs, part: slice) -> AttentionInputs:
    bias = inputs.bias
    if bias is not None and bias.dim() == 4 and bias.shape[0] > 1:
        bias = bias[part]
    return inputs._replace(
        query=inputs.query[part], key=inputs.key[part], value=inputs.value[part], bias=bias, gate=None
    )
