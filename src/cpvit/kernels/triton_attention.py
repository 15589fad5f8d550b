"""Triton: attention output and column maxima in two passes over tiles; the N x N matrix is never stored.

With logits s_ij = scale * q_i k_j + bias_ij, the first pass is flash attention (arXiv 2205.14135): it gives the
output and the logarithm of every row's sum, L_i = log sum_j exp(s_ij). The second recomputes the tiles the
other way round: each program holds a tile of keys, loops over all queries, and computes

    max_i A_ij = exp(max_i (s_ij - L_i)).

No two programs write the same element: there are no atomics, and the result is deterministic.

Legend: B images, H heads, N tokens, D head dimension.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Annotations are not postponed here: the interpreter of Triton 3.1 knows tl.constexpr only by the object.
import torch
import triton
import triton.language as tl
from torch import Tensor

from cpvit.attention import Attended, AttentionInputs, attend

MAX_HEAD_DIM = 128
TILE = 64
"""Queries, and keys, per tile."""


def scored_attention(inputs: AttentionInputs) -> Attended:
    """Output [B H N D] and column maxima [B H N] (float32).

    Meta tensors (used to count MACs) take torch's own operations.

    Raises:
        RuntimeError: Tensors that are not on a CUDA device, or that require grad.
        ValueError: A head dimension above 128, attention dropout, or a type other than float32, bfloat16, float16.
    """
    if inputs.query.device.type == "meta":
        return attend(inputs, evidence="max")
    _refuse(inputs)
    query, key, value, scale, bias, *_ = inputs
    out, maxima = _column_maxima(query, key, value, bias, scale)
    return Attended(out, maxima)


def _refuse(inputs: AttentionInputs) -> None:
    query = inputs.query
    if query.device.type != "cuda":
        raise RuntimeError(
            f"attention_kernel='triton' got tensors on {query.device}; move the model to a CUDA device, or prune "
            "it with attention_kernel='eager'"
        )
    if torch.is_grad_enabled() and any(each.requires_grad for each in inputs[:3]):
        raise RuntimeError(
            "attention_kernel='triton' has no backward pass; run the model inside torch.inference_mode(), or prune "
            "it with attention_kernel='eager' to train it"
        )
    check(inputs)


def check(inputs: AttentionInputs) -> None:
    """Raise ValueError for inputs that the kernel does not support."""
    head_dim, dtype = inputs.query.shape[3], inputs.query.dtype
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"attention_kernel='triton' takes a head dimension up to 128, got {head_dim}; use 'eager'"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention_kernel='triton' takes float32, bfloat16 and float16, got {dtype}; use 'eager'"
        )
    if inputs.dropout:
        raise ValueError(
            "attention_kernel='triton' has no attention dropout; call model.eval(), or use 'eager'"
        )


@torch.library.custom_op(
    "cpvit::column_maxima",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale) -> (Tensor, Tensor)",
)
def _column_maxima(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One custom op for torch.compile and torch.export: query, key, value [B H N D] -> [B H N D], [B H N]."""
    return column_maxima(query, key, value, bias, scale)


@_column_maxima.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_output(value), query.new_empty(query.shape[:3], dtype=torch.float32)


def column_maxima(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch both passes; bias broadcasts to [B H N N]."""
    batch, heads, tokens, head_dim = query.shape
    out = _empty_output(value)
    row_sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    maxima = torch.empty_like(row_sums)
    has_bias = bias is not None
    bias = query if bias is None else bias.expand(batch, heads, tokens, tokens)  # not read without a bias
    constants = {
        "has_bias": has_bias,
        "head_dim": head_dim,
        "width": max(16, triton.next_power_of_2(head_dim)),
        "tile": TILE,
    }
    grid = (triton.cdiv(tokens, TILE), batch * heads)
    shape = (heads, tokens, scale)
    pointers, strides = (query, key, bias), (*query.stride(), *key.stride(), *bias.stride())
    _forward[grid](
        *pointers, value, out, row_sums, *strides, *value.stride(), *out.stride(), *shape, **constants
    )
    _maxima[grid](*pointers, row_sums, maxima, *strides, *shape, **constants)
    return out, maxima


def _empty_output(value: Tensor) -> Tensor:
    """[B H N D], laid out so that joining the heads is a view."""
    batch, heads, tokens, head_dim = value.shape
    return value.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


@triton.jit
def _rows(pointer, number, heads, b_stride, h_stride, n_stride, d_stride, rows, columns, tokens, head_dim):
    """Load rows of one head of one image: [rows, columns], zero outside."""
    start = pointer + (number // heads) * b_stride + (number % heads) * h_stride
    inside = (rows[:, None] < tokens) & (columns[None, :] < head_dim)
    return tl.load(start + rows[:, None] * n_stride + columns[None, :] * d_stride, mask=inside, other=0.0)


@triton.jit
def _logits(
    q,
    k,
    bias,
    number,
    heads,
    b_stride,
    h_stride,
    i_stride,
    j_stride,
    i,
    j,
    tokens,
    scale,
    has_bias: tl.constexpr,
):
    """One tile of scale * q k + bias: [i, j], -inf outside."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    inside = (i[:, None] < tokens) & (j[None, :] < tokens)
    if has_bias:
        start = bias + (number // heads) * b_stride + (number % heads) * h_stride
        added = tl.load(start + i[:, None] * i_stride + j[None, :] * j_stride, mask=inside, other=0.0)
        s += added.to(tl.float32)
    return tl.where(inside, s, -float("inf"))


@triton.jit
def _forward(
    query, key, bias, value, out, row_sums,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, b_b, b_h, b_i, b_j, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d,
    heads, tokens, scale,
    has_bias: tl.constexpr, head_dim: tl.constexpr, width: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """First pass: a tile of queries, all keys."""
    number = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * tile + tl.arange(0, tile)
    d = tl.arange(0, width)
    q = _rows(query, number, heads, q_b, q_h, q_n, q_d, i, d, tokens, head_dim)
    highest = tl.full([tile], -1e30, tl.float32)  # finite: rows outside are all -inf
    total = tl.zeros([tile], tl.float32)
    mixed = tl.zeros([tile, width], tl.float32)
    for start in range(0, tokens, tile):
        j = start + tl.arange(0, tile)
        k = _rows(key, number, heads, k_b, k_h, k_n, k_d, j, d, tokens, head_dim)
        s = _logits(q, k, bias, number, heads, b_b, b_h, b_i, b_j, i, j, tokens, scale, has_bias)
        higher = tl.maximum(highest, tl.max(s, 1))
        weight = tl.exp(s - higher[:, None])
        rescale = tl.exp(highest - higher)
        total = total * rescale + tl.sum(weight, 1)
        v = _rows(value, number, heads, v_b, v_h, v_n, v_d, j, d, tokens, head_dim)
        mixed = mixed * rescale[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        highest = higher
    here = out + (number // heads) * o_b + (number % heads) * o_h
    mixed = mixed / tl.where(i < tokens, total, 1.0)[:, None]
    inside = (i[:, None] < tokens) & (d[None, :] < head_dim)
    tl.store(here + i[:, None] * o_n + d[None, :] * o_d, mixed.to(out.dtype.element_ty), mask=inside)
    row_sum = highest + tl.log(tl.where(i < tokens, total, 1.0))
    tl.store(row_sums + number * tokens + i, row_sum, mask=i < tokens)


@triton.jit
def _maxima(
    query, key, bias, row_sums, maxima,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, b_b, b_h, b_i, b_j,
    heads, tokens, scale,
    has_bias: tl.constexpr, head_dim: tl.constexpr, width: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Second pass: a tile of keys, all queries."""
    number = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * tile + tl.arange(0, tile)
    d = tl.arange(0, width)
    k = _rows(key, number, heads, k_b, k_h, k_n, k_d, j, d, tokens, head_dim)
    strongest = tl.full([tile], -float("inf"), tl.float32)
    for start in range(0, tokens, tile):
        i = start + tl.arange(0, tile)
        q = _rows(query, number, heads, q_b, q_h, q_n, q_d, i, d, tokens, head_dim)
        s = _logits(q, k, bias, number, heads, b_b, b_h, b_i, b_j, i, j, tokens, scale, has_bias)
        row_sum = tl.load(row_sums + number * tokens + i, mask=i < tokens, other=0.0)
        strongest = tl.maximum(strongest, tl.max(s - row_sum[:, None], 0))
    tl.store(maxima + number * tokens + j, tl.exp(strongest), mask=j < tokens)
