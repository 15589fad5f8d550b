"""CP-ViT in one file: score, accumulate, remove, block by block.

Source: "CP-ViT: Cascade Vision Transformer Pruning via Progressive Sparsity Prediction", arXiv 2203.04570.

All functions are pure functions of tensors and do not depend on the library of the model. The host (the model that is
pruned) provides each of its blocks as a :class:`BlockView`; :func:`run_block` runs one block of the method on it.

Legend: B images, H heads, P prefix tokens (class, distillation, registers; never pruned), n patches that enter this
block, N = P + n tokens, N0 patches of the whole image, D head dimension, C channels, A attention probabilities.

    evidence        M[b,h,j] = max_i A[b,h,i,j]              attention statistic of token j: its column maximum
    patch score     S[b,j]   = sum_h M[b,h,j]                accumulated over the blocks so far (the cascade)
    head score      T[b,h]   = sum_j M[b,h,j]                accumulated likewise
    removal         the patches of lowest accumulated score leave the sequence, between attention and MLP

"Evidence" is the attention statistic, per head and token, that a method computes its scores from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from cpvit.attention import AttentionInputs, EvidenceKind, ScoredAttention, attend, replaced

HostArguments: TypeAlias = Mapping[str, object]


class TokenState(NamedTuple):
    """State of the patch tokens between two blocks. Immutable: every step returns a new one."""

    positions: Tensor
    """[B n] original position of each patch, row-major over the grid."""
    score: Tensor | None = None
    """[B n] accumulated patch score; None until a block was scored."""
    head_score: Tensor | None = None
    """[B H] accumulated head score; None unless heads are masked per image."""
    size: Tensor | None = None
    """[B n] number of patches in each token; None while every token is one patch."""
    carrier: Tensor | None = None
    """[B N0] for each original patch, the index of the token it was merged into; None if patches are removed."""
    departed: Tensor | None = None
    """[B N0 C] value of every removed patch when it was removed; None unless the full grid is returned."""


class BlockView(Protocol):
    """One transformer block of the host, split into the three parts that pruning needs."""

    def attention_inputs(self, x: Tensor, positions: Tensor | None, extra: HostArguments) -> AttentionInputs:
        """Norm and projections: x [B N C] -> query, key, value [B H N D], bias and scale.

        ``positions`` is [B n] once patches were removed (for rotary and relative positions), else None.
        ``extra`` holds the keyword arguments that the host passes to its block (a rotary embedding, a shared bias).
        """
        ...

    def attention_residual(self, x: Tensor, inputs: AttentionInputs, out: Tensor) -> Tensor:
        """Projection, LayerScale, DropPath and residual: x [B N C], out [B H N D] -> [B N C]."""
        ...

    def mlp_residual(self, x: Tensor) -> Tensor:
        """Second half of the block: [B N C] -> [B N C]."""
        ...


class BlockStep(NamedTuple):
    """What one block does, as planned."""

    keep: int
    """Patches that leave the block."""
    score: bool
    """Whether this block's attention is scored."""
    pruned: bool = False
    """Whether an earlier block removed patches (the host then needs their positions)."""
    mask_heads: int | None = None
    """Heads kept per image by a mask (research mode: saves no time); None for all."""
    depth: float = 0.0
    """Fraction of the blocks that come before this one, 0 to below 1."""


class Method(Protocol):
    """How patch tokens are scored, and how their number is reduced."""

    name: str
    evidence: EvidenceKind
    """Attention statistic that the scores are computed from; "none" keeps the attention fused in every block."""
    cumulative: bool
    """Whether blocks before a removal are scored too, since scores accumulate."""
    merges: bool
    """Whether patches are merged into a token that stays, instead of being removed."""
    halves: bool
    """Whether one block can remove at most half of the tokens."""
    schedule: str
    """Schedule over depth by default; "auto" is layer-aware with calibration images, else the linear ramp."""
    proportional: bool
    """Whether attention is proportional: the logarithm of a token's size is added to its logits."""

    def observe(self, state: TokenState, evidence: Tensor, num_prefix: int) -> TokenState:
        """The state with the score updated by one block's evidence [B H N]."""
        ...

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """x [B P+n C] -> [B P+step.keep C]."""
        ...

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """Multiply-accumulates of ``reduce`` from ``patches`` to ``keep`` tokens, for one image."""
        ...


class CPViT:
    """The paper's method: remove the patches of lowest cumulative score (arXiv 2203.04570)."""

    name = "cpvit"
    evidence: EvidenceKind = "max"
    cumulative = True
    merges = False
    halves = False
    schedule = "auto"
    proportional = False

    def observe(self, state: TokenState, evidence: Tensor, num_prefix: int) -> TokenState:
        """C^l = C^(l-1) + S^l."""
        score = patch_score(evidence, num_prefix)
        return replaced(state, score=score if state.score is None else state.score + score)

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """Keep the ``step.keep`` patches with the highest cumulative score."""
        assert state.score is not None, "a block must be scored before patches can leave it"
        return remove(x, state, highest(state.score, step.keep), num_prefix)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """0: removal needs no multiplications."""
        return 0


def patch_score(evidence: Tensor, num_prefix: int) -> Tensor:
    """S = sum over heads of the evidence: [B H N] -> [B n], at least float32."""
    return evidence.sum(dim=1, dtype=accumulator_dtype(evidence))[:, num_prefix:]


def head_score(evidence: Tensor) -> Tensor:
    """T = sum over tokens of the evidence: [B H N] -> [B H], at least float32."""
    return evidence.sum(dim=2, dtype=accumulator_dtype(evidence))


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """At least float32: scores are summed over 12 to 40 blocks, and in half precision many would become equal."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def highest(score: Tensor, keep: int) -> Tensor:
    """[B n] -> [B keep] indices of the highest scores, ascending (so that memory access stays local)."""
    return score.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


def take(values: Tensor, index: Tensor) -> Tensor:
    """Gather along dimension 1: [B n ...] by [B k] -> [B k ...]."""
    return values.gather(1, index) if values.dim() == 2 else take_each(values, index)[0]


def take_each(values: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
    """Rows of [B n C] by several [B k]: [B k C] each. Copies whole rows, which is faster than gather."""
    flat, first = values.flatten(0, 1), first_rows(values)
    return tuple(
        flat.index_select(0, (index if first is None else index + first).flatten()).unflatten(0, index.shape)
        for index in indices
    )


def first_rows(values: Tensor) -> Tensor | None:
    """Where each image begins if the rows of all images follow each other: [B n C] -> [B 1]; None for one image."""
    if values.shape[0] == 1:
        return None
    return (torch.arange(values.shape[0], device=values.device) * values.shape[1]).unsqueeze(1)


def remove(x: Tensor, state: TokenState, kept: Tensor, num_prefix: int) -> tuple[Tensor, TokenState]:
    """Remove every patch outside ``kept`` [B k]: x [B P+n C] -> [B P+k C]. Prefix tokens always stay."""
    state = _store_removed(x, state, num_prefix)
    return take_tokens(x, kept, num_prefix), replaced(
        state,
        positions=take(state.positions, kept),
        score=None if state.score is None else take(state.score, kept),
        size=None if state.size is None else take(state.size, kept),
    )


def take_tokens(x: Tensor, patches: Tensor, num_prefix: int) -> Tensor:
    """The prefix tokens and the given patches [B k]: x [B P+n C] -> [B P+k C]."""
    return take(x, with_prefix(patches, num_prefix))


def with_prefix(patches: Tensor, num_prefix: int) -> Tensor:
    """Rows of the prefix tokens, then those of the patches: [B k] -> [B P+k]."""
    if not num_prefix:
        return patches
    prefix = torch.arange(num_prefix, device=patches.device).expand(patches.shape[0], num_prefix)
    return torch.cat([prefix, patches + num_prefix], dim=1)


def _store_removed(x: Tensor, state: TokenState, num_prefix: int) -> TokenState:
    """Store the values of all current patches at their positions; those of the survivors are overwritten later."""
    if state.departed is None:
        return state
    return replaced(state, departed=scatter_patches(state.departed, state.positions, x[:, num_prefix:]))


def scatter_patches(grid: Tensor, positions: Tensor, patches: Tensor) -> Tensor:
    """The grid [B N0 C] with patches [B n C] written at their positions [B n]."""
    return grid.scatter(1, positions.unsqueeze(-1).expand_as(patches), patches)


def initial_state(x: Tensor, num_prefix: int, *, track_carrier: bool, keep_departed: bool) -> TokenState:
    """State before the first block: all patches present, nothing scored. x [B P+N0 C]."""
    batch, patches = x.shape[0], x.shape[1] - num_prefix
    positions = torch.arange(patches, device=x.device).expand(batch, patches)
    return TokenState(
        positions=positions,
        carrier=positions if track_carrier else None,
        departed=x[:, num_prefix:] if keep_departed else None,
    )


def drop_lowest_heads(score: Tensor, keep: int) -> Tensor:
    """Score [B H] with all but the ``keep`` highest heads at -inf, where they stay whatever is added later."""
    lowest = torch.full_like(score, float("-inf"))
    index = score.topk(keep, dim=1).indices
    return lowest.scatter(1, index, score.gather(1, index))


def zero_masked_heads(values: Tensor, head_score: Tensor | None) -> Tensor:
    """Zero the values [B H ...] of heads that are masked, that is, whose head_score [B H] is -inf."""
    if head_score is None:
        return values
    alive = torch.isfinite(head_score).to(values.dtype)
    return values * alive.reshape(*alive.shape, *[1] * (values.dim() - 2))


def token_sizes(state: TokenState, num_prefix: int) -> Tensor | None:
    """Patches in every token, prefix tokens included (1 each): [B n] -> [B P+n]; None while all sizes are 1."""
    if state.size is None:
        return None
    return torch.cat([state.size.new_ones(state.size.shape[0], num_prefix), state.size], dim=1)


def run_block(
    view: BlockView,
    method: Method,
    step: BlockStep,
    x: Tensor,
    state: TokenState,
    *,
    num_prefix: int,
    extra: HostArguments,
    return_probs: bool = False,
    kernel: ScoredAttention | None = None,
) -> tuple[Tensor, TokenState, Tensor | None]:
    """One block: attention, score, removal or merge, MLP.

    Args:
        view: The host's block.
        method: How to score and reduce.
        step: How many patches leave this block, and whether it is scored.
        x: [B P+n C] tokens that enter.
        state: State of the n patches.
        num_prefix: P.
        extra: Keyword arguments that the host passed to its block.
        return_probs: Also return the attention probabilities (for calibration).
        kernel: Kernel for output and column maxima; None for torch's own operations.

    Returns:
        Tokens [B P+keep C], the new state, and the probabilities [B H N N] if ``return_probs``, else None.
    """
    x, state, probs = _attend(view, method, step, x, state, num_prefix, extra, return_probs, kernel)
    return view.mlp_residual(x), state, probs


def _attend(
    view: BlockView,
    method: Method,
    step: BlockStep,
    x: Tensor,
    state: TokenState,
    num_prefix: int,
    extra: HostArguments,
    return_probs: bool,
    kernel: ScoredAttention | None,
) -> tuple[Tensor, TokenState, Tensor | None]:
    """First half of the block. A function of its own: query, key and value are freed before the MLP runs."""
    inputs = view.attention_inputs(x, state.positions if step.pruned else None, extra)
    attended = attend(
        inputs,
        sizes=token_sizes(state, num_prefix) if method.proportional else None,
        evidence=method.evidence if step.score else "none",
        num_prefix=num_prefix,
        return_probs=return_probs,
        kernel=kernel,
    )
    state, out = _accumulate(method, step, state, attended.out, attended.evidence, num_prefix)
    x = view.attention_residual(x, inputs, out)
    if step.keep < state.positions.shape[1]:
        x, state = method.reduce(x, state, inputs, step, num_prefix)
    return x, state, attended.probs


def _accumulate(
    method: Method, step: BlockStep, state: TokenState, out: Tensor, evidence: Tensor | None, num_prefix: int
) -> tuple[TokenState, Tensor]:
    """Accumulate the scores of one block. With ``mask_heads``, also mask its lowest heads, permanently."""
    if evidence is None:
        return state, out
    evidence = zero_masked_heads(evidence, state.head_score)
    state = method.observe(state, evidence, num_prefix)
    if step.mask_heads is None:
        return state, out
    total = head_score(evidence) if state.head_score is None else state.head_score + head_score(evidence)
    remaining = drop_lowest_heads(total, step.mask_heads)
    return replaced(state, head_score=remaining), zero_masked_heads(out, remaining)


def full_grid(x: Tensor, state: TokenState, num_prefix: int) -> Tensor:
    """Every patch in its original place: [B P+n C] -> [B P+N0 C].

    A merged patch gets the value of the token it was merged into, a removed one its value when it was removed.
    """
    if state.carrier is not None:
        return take_tokens(x, state.carrier, num_prefix)
    assert state.departed is not None, "keep_departed=False: removed patches were not stored"
    grid = scatter_patches(state.departed, state.positions, x[:, num_prefix:])
    return torch.cat([x[:, :num_prefix], grid], dim=1)
