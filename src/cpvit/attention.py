"""Attention of one block: fused where no score is needed, otherwise with the attention statistic ("evidence").

Legend: B images, H heads, N tokens, D head dimension. Rows of the attention matrix are queries, columns are keys.

The evidence [B H N] is one number per head and key: "max", the column maximum over all queries; or "class", the row of
the class token (the mean over all queries where there is no class token).

Four implementations compute the same output:

* *fused*: ``scaled_dot_product_attention``; the N x N matrix is never stored;
* *workspace*: on a CPU, without autograd: the matrix of a few images or heads at a time, in one buffer that fits the
  cache. As fast as the fused kernel, faster in half precision, and gives either evidence;
* *class row*: fused output, plus one extra query row for the attention of the class token;
* *explicit*: the whole matrix, for what the others cannot do: training, compiled graphs, returning probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

EvidenceKind: TypeAlias = Literal["none", "max", "class"]

CHUNK_BYTES = 2 << 20
"""Bytes of attention matrix computed at once on a CPU, per thread: about twice the size of a core's own cache."""

MOST_CHUNKED_THREADS = 4
"""More threads than this do not enlarge the chunk: the buffer must stay small compared with the activations."""

ROW_BYTES = 64
"""Rows of the buffer are padded to a multiple of this: a partial vector register can double the time of a softmax."""

FEW_TOKENS = 256
"""Up to this N, and in half precision always, the workspace is faster than the fused kernel plus a class row ..."""

FEW_MATRICES = 16
"""... unless there are fewer images times heads than this."""


class AttentionInputs(NamedTuple):
    """Inputs of the attention of one host block."""

    query: Tensor
    """[B H N D], with the host's rotary embedding and normalisation applied."""
    key: Tensor
    """[B H N D]."""
    value: Tensor
    """[B H N D]."""
    scale: float
    """Factor of query @ key."""
    bias: Tensor | None = None
    """Added to the logits; broadcasts to [B H N N]."""
    gate: Tensor | None = None
    """[B N H*D] factor that the host multiplies the attention output by."""
    dropout: float = 0.0
    """Probability of dropping an attention weight (training only)."""


class Attended(NamedTuple):
    """Result of one attention."""

    out: Tensor
    """[B H N D]."""
    evidence: Tensor | None = None
    """[B H N]: "max": column maxima; "class": attention of the class token to each key."""
    probs: Tensor | None = None
    """[B H N N] attention probabilities, only with ``return_probs``."""


Values = TypeVar("Values", bound=NamedTuple)


def replaced(values: Values, **changes: object) -> Values:
    """``values._replace(**changes)``, in a form that torch.compile of torch 2.5 can look into."""
    kind: Any = type(values)
    copy: Values = kind(**{**dict(zip(kind._fields, values, strict=True)), **changes})
    return copy


class ScoredAttention(Protocol):
    """A kernel that computes output and column maxima in one call; see :mod:`cpvit.kernels`."""

    def __call__(self, inputs: AttentionInputs) -> Attended:
        """``out`` and the "max" evidence."""
        ...


def attend(
    inputs: AttentionInputs,
    *,
    sizes: Tensor | None = None,
    evidence: EvidenceKind = "none",
    num_prefix: int = 1,
    return_probs: bool = False,
    kernel: ScoredAttention | None = None,
) -> Attended:
    """Attention output and, if requested, the evidence of every token.

    Args:
        inputs: Query, key, value of the block.
        sizes: [B N] number of patches in each token; its logarithm is added to the logits, so that a merged token has
            the weight of the patches in it (proportional attention, ToMe, arXiv 2210.09461, Eq. 3).
        evidence: Which statistic to compute; "none" keeps the attention fused.
        num_prefix: Number of prefix tokens; if 0, "class" evidence is the mean over all queries.
        return_probs: Also return the probabilities.
        kernel: Kernel for "max" evidence; None for torch's own operations.
    """
    inputs = inputs if sizes is None else replaced(inputs, bias=_with_log_sizes(inputs, sizes))
    if return_probs:
        return _explicit(inputs, evidence, num_prefix, keep_probs=True)
    if evidence == "none":
        return Attended(_fused(inputs))
    if evidence == "max" and kernel is not None:
        return kernel(inputs)
    if _can_use_workspace(inputs) and (evidence == "max" or _workspace_is_faster(inputs.query)):
        return _in_workspace(inputs, evidence, num_prefix)
    if evidence == "class" and num_prefix:
        return Attended(_fused(inputs), _class_row(inputs))
    return _explicit(inputs, evidence, num_prefix, keep_probs=False)


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
    """Attention of the class token (row 0) to every token: [B H N]."""
    first = inputs if inputs.bias is None else replaced(inputs, bias=inputs.bias[..., :1, :])
    return _probabilities(first, inputs.query[:, :, :1]).squeeze(2)


def _explicit(
    inputs: AttentionInputs, evidence: EvidenceKind, num_prefix: int, *, keep_probs: bool
) -> Attended:
    probs = _probabilities(inputs, inputs.query)
    out = F.dropout(probs, inputs.dropout) if inputs.dropout else probs
    found = None if evidence == "none" else _evidence(probs, evidence, num_prefix)
    return Attended(out @ inputs.value, found, probs if keep_probs else None)


def _evidence(probs: Tensor, kind: EvidenceKind, num_prefix: int) -> Tensor:
    if kind == "max":
        return probs.amax(dim=-2)
    return probs[:, :, 0] if num_prefix else probs.mean(dim=-2)


def _can_use_workspace(inputs: AttentionInputs) -> bool:
    """Buffers are written in place, so: on a CPU, and nothing records, traces or recasts the operations."""
    tensors = (inputs.query, inputs.key, inputs.value, inputs.bias)
    return (
        inputs.query.device.type == "cpu"
        and not inputs.dropout
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
    )


def _workspace_is_faster(query: Tensor) -> bool:
    batch, heads, tokens, _ = query.shape
    return batch * heads >= FEW_MATRICES and (query.element_size() < 4 or tokens <= FEW_TOKENS)


def _in_workspace(inputs: AttentionInputs, evidence: EvidenceKind, num_prefix: int) -> Attended:
    """Attention of a few images or heads at a time, always in the same buffer.

    The keys are padded, not the matrix: ``baddbmm`` needs a contiguous result to run as one batch.
    """
    query, key, value, _, bias, *_ = inputs
    batch, heads, tokens, head_dim = value.shape
    lanes = ROW_BYTES // query.element_size()
    width = -(-tokens // lanes) * lanes
    if bias is not None and bias.shape[-2] == 1:
        # One row for all queries gets the padding's: whole rows are added at a time, and what is padded is done.
        inputs = replaced(inputs, bias=F.pad(bias, (0, width - tokens), value=-inf))
    pieces = list(_pieces(query, _budget(query)))
    if len(pieces) == 1:
        return _in_one_piece(inputs, evidence, num_prefix, width)
    rows = max(query[piece].shape[:2].numel() for piece in pieces)
    padded = key.new_zeros(rows, width, key.shape[3])
    matrix = query.new_empty(rows, tokens, width)
    out = value.new_empty(batch, tokens, heads, head_dim).transpose(
        1, 2
    )  # so that joining the heads is a view
    scores = query.new_empty(batch, heads, width)
    bias = inputs.bias
    if bias is not None:
        bias = bias.expand(batch, heads, tokens, bias.shape[-1])
    for piece in pieces:
        q, v = query[piece].flatten(0, 1), value[piece].flatten(0, 1)
        k, probs = padded[: len(q)], matrix[: len(q)]
        shape = query[piece].shape[:2]
        k[:, :tokens].unflatten(0, shape).copy_(key[piece])
        _softmax_into(probs, q, k, inputs.scale, None if bias is None else bias[piece], shape)
        scores[piece] = _evidence(probs.unflatten(0, shape), evidence, num_prefix)
        out[piece] = torch.bmm(probs[..., :tokens], v).unflatten(0, shape)
    return Attended(out, scores[..., :tokens])


def _in_one_piece(inputs: AttentionInputs, evidence: EvidenceKind, num_prefix: int, width: int) -> Attended:
    """The same where all of it fits the buffer: for few images what takes time is the number of operations."""
    query, key, value, scale, bias, *_ = inputs
    shape, tokens = query.shape[:2], query.shape[2]
    k = F.pad(key, (0, 0, 0, width - tokens)) if width > tokens else key
    probs = query.new_empty(shape.numel(), tokens, width)
    _softmax_into(probs, query.flatten(0, 1), k.flatten(0, 1), scale, bias, shape)
    kept = probs if width == tokens else probs.narrow(2, 0, tokens)
    out = torch.bmm(kept, value.flatten(0, 1)).unflatten(0, shape)
    return Attended(out, _evidence(kept.unflatten(0, shape), evidence, num_prefix))


def _softmax_into(
    probs: Tensor, query: Tensor, key: Tensor, scale: float, bias: Tensor | None, shape: torch.Size
) -> None:
    """Fill the buffer [B*H N W] with probabilities, 0 beyond the N tokens; bias broadcasts to [*shape N N or W]."""
    tokens, width = probs.shape[1:]
    torch.baddbmm(probs, query, key.transpose(1, 2), beta=0, alpha=scale, out=probs)
    covered = 0 if bias is None else bias.shape[-1]
    if bias is not None:
        (probs if covered == width else probs[..., :covered]).unflatten(0, shape).add_(bias)
    if covered < width > tokens:
        probs.narrow(2, tokens, width - tokens).fill_(-inf)
    torch.softmax(probs, dim=-1, out=probs)


def _budget(query: Tensor) -> int:
    """Bytes of the matrix to compute at once: what fits the caches, no more than the MLP takes later."""
    cached = CHUNK_BYTES * min(torch.get_num_threads(), MOST_CHUNKED_THREADS)
    return min(cached, 4 * query.numel() * query.element_size())


def _pieces(query: Tensor, budget: int) -> Iterator[tuple[slice, slice]]:
    """Slices of images and heads whose matrices take about ``budget`` bytes: whole images where possible."""
    batch, heads, tokens, _ = query.shape
    image = heads * tokens * tokens * query.element_size()
    images = max(1, budget // image)
    group = -(-heads // min(heads, -(-image // budget)))
    for first in range(0, batch, images):
        for head in range(0, heads, group):
            yield slice(first, first + images), slice(head, head + group)
