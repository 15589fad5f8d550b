"""CP-ViT, readable in one file: score, accumulate, remove, block by block.

Source: "CP-ViT: Cascade Vision Transformer Pruning via Progressive Sparsity Prediction", arXiv 2203.04570.

Everything here is a pure function of tensors; nothing knows which library the model came from. The host
describes one of its blocks through :class:`BlockView`; :func:`run_block` does with it what the paper says.

Legend: B images, H heads, P prefix tokens (class, distillation, registers; never pruned), n patches alive in
this block, N = P + n tokens, N0 patches of the untouched image, D head dimension, C channels.

    evidence        M[b,h,j] = max_i A[b,h,i,j]              how strongly any query needs token j
    patch score     S[b,j]   = sum_h M[b,h,j]                accumulated over the blocks so far (the cascade)
    head score      T[b,h]   = sum_j M[b,h,j]                accumulated likewise
    removal         the patches of lowest accumulated score leave the sequence, between attention and MLP
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from cpvit.attention import AttentionInputs, EvidenceKind, ScoredAttention, attend

HostArguments: TypeAlias = Mapping[str, object]


class TokenState(NamedTuple):
    """What the cascade knows about the patches that are still alive. A value: every step returns a new one."""

    positions: Tensor
    """[B n] original position of each patch, row-major over the grid."""
    score: Tensor | None = None
    """[B n] accumulated patch score; None until a block was scored."""
    head_score: Tensor | None = None
    """[B H] accumulated head score; None unless heads are masked per image."""
    size: Tensor | None = None
    """[B n] how many patches each token stands for; None while every token is one patch."""
    carrier: Tensor | None = None
    """[B N0] index into the n tokens of the one that carries each original patch; None if patches are removed."""
    departed: Tensor | None = None
    """[B N0 C] last value of every patch; kept only when the full grid is asked for."""


class BlockView(Protocol):
    """One transformer block of a host model, in the three parts the cascade needs."""

    def attention_inputs(self, x: Tensor, positions: Tensor | None, extra: HostArguments) -> AttentionInputs:
        """Norm and projections: x [B N C] -> query, key, value [B H N D], bias and scale.

        ``positions`` is [B n] once patches have left (for rotary and relative positions), else None.
        ``extra`` holds the keyword arguments the host passes to its block (a rotary embedding, a shared bias).
        """
        ...

    def attention_residual(self, x: Tensor, inputs: AttentionInputs, out: Tensor) -> Tensor:
        """Projection, LayerScale, DropPath and residual: x [B N C], out [B H N D] -> [B N C]."""
        ...

    def mlp_residual(self, x: Tensor) -> Tensor:
        """Second half of the block: [B N C] -> [B N C]."""
        ...


class BlockStep(NamedTuple):
    """What to do in one block."""

    keep: int
    """Patches that leave the block."""
    score: bool
    """Whether this block's attention is scored."""
    pruned: bool = False
    """Whether patches have left before this block (positions then matter to the host)."""
    mask_heads: int | None = None
    """Heads kept per image by a mask (research mode: costs the same time); None for all."""
    depth: float = 0.0
    """Share of the blocks that come before this one."""


class Method(Protocol):
    """How patches are scored and what happens to those that go."""

    name: str
    evidence: EvidenceKind
    """What the scores are made from; "none" keeps attention fused everywhere."""
    cumulative: bool
    """Whether blocks before a removal are scored too."""
    merges: bool
    """Whether patches that leave are carried by a token that stays, rather than lost."""
    halves: bool
    """Whether at most half of the patches can leave one block."""
    schedule: str
    """Spread over depth where none is asked for; "auto" is layer-aware with images, else the linear ramp."""
    proportional: bool
    """Whether a token that stands for several patches weighs as many in the attention."""

    def observe(self, state: TokenState, evidence: Tensor, num_prefix: int) -> TokenState:
        """Account for one block's evidence [B H N]."""
        ...

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """x [B P+n C] -> [B P+step.keep C]."""
        ...

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """What ``reduce`` multiplies to get from ``patches`` to ``keep``, for one image."""
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
        return state._replace(score=score if state.score is None else state.score + score)

    def reduce(
        self, x: Tensor, state: TokenState, inputs: AttentionInputs, step: BlockStep, num_prefix: int
    ) -> tuple[Tensor, TokenState]:
        """Keep the ``step.keep`` patches with the highest cumulative score."""
        assert state.score is not None, "a block must be scored before patches can leave it"
        return remove(x, state, highest(state.score, step.keep), num_prefix)

    def matching_macs(self, patches: int, keep: int, embed_dim: int, head_dim: int) -> int:
        """Removing multiplies nothing."""
        return 0


def patch_score(evidence: Tensor, num_prefix: int) -> Tensor:
    """S = sum over heads of the evidence: [B H N] -> [B n], at least float32."""
    return evidence.sum(dim=1, dtype=accumulator_dtype(evidence))[:, num_prefix:]


def head_score(evidence: Tensor) -> Tensor:
    """T = sum over tokens of the evidence: [B H N] -> [B H], at least float32."""
    return evidence.sum(dim=2, dtype=accumulator_dtype(evidence))


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """Scores are summed over 12 to 40 blocks: half precision would tie thousands of them."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def highest(score: Tensor, keep: int) -> Tensor:
    """[B n] -> [B keep] indices of the highest scores, in their original order (memory stays local)."""
    return score.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


def take(values: Tensor, index: Tensor) -> Tensor:
    """Gather along dimension 1: [B n ...] by [B k] -> [B k ...]. Whole rows are copied, where there are any."""
    if values.dim() == 2:
        return values.gather(1, index)
    return values.flatten(0, 1).index_select(0, flat_rows(index, values.shape[1])).unflatten(0, index.shape)


def flat_rows(index: Tensor, rows: int) -> Tensor:
    """Where row ``index`` [B k] of each image lies once images of ``rows`` rows follow one another: [B*k]."""
    if index.shape[0] == 1:
        return index.flatten()
    first = torch.arange(index.shape[0], device=index.device) * rows
    return (index + first.unsqueeze(1)).flatten()


def remove(x: Tensor, state: TokenState, kept: Tensor, num_prefix: int) -> tuple[Tensor, TokenState]:
    """Let every patch outside ``kept`` [B k] leave: x [B P+n C] -> [B P+k C]. Prefix tokens always stay."""
    state = _remember_departing(x, state, num_prefix)
    return take_tokens(x, kept, num_prefix), state._replace(
        positions=take(state.positions, kept),
        score=None if state.score is None else take(state.score, kept),
        size=None if state.size is None else take(state.size, kept),
    )


def take_tokens(x: Tensor, patches: Tensor, num_prefix: int) -> Tensor:
    """The prefix and the given patches [B k]: x [B P+n C] -> [B P+k C]."""
    if not num_prefix:
        return take(x, patches)
    prefix = torch.arange(num_prefix, device=x.device).expand(x.shape[0], num_prefix)
    return take(x, torch.cat([prefix, patches + num_prefix], dim=1))


def _remember_departing(x: Tensor, state: TokenState, num_prefix: int) -> TokenState:
    if state.departed is None:
        return state
    return state._replace(departed=scatter_patches(state.departed, state.positions, x[:, num_prefix:]))


def scatter_patches(grid: Tensor, positions: Tensor, patches: Tensor) -> Tensor:
    """Write patches [B n C] at their positions [B n] of the grid [B N0 C]."""
    return grid.scatter(1, positions.unsqueeze(-1).expand_as(patches), patches)


def initial_state(x: Tensor, num_prefix: int, *, track_carrier: bool, keep_departed: bool) -> TokenState:
    """State before the first block: every patch alive, nothing scored. x [B P+N0 C]."""
    batch, patches = x.shape[0], x.shape[1] - num_prefix
    positions = torch.arange(patches, device=x.device).expand(batch, patches)
    return TokenState(
        positions=positions,
        carrier=positions if track_carrier else None,
        departed=x[:, num_prefix:] if keep_departed else None,
    )


def drop_lowest_heads(score: Tensor, keep: int) -> Tensor:
    """Score [B H] with all but the ``keep`` highest heads at -inf, from where no later block brings them back."""
    lowest = torch.full_like(score, float("-inf"))
    index = score.topk(keep, dim=1).indices
    return lowest.scatter(1, index, score.gather(1, index))


def only_alive(values: Tensor, head_score: Tensor | None) -> Tensor:
    """Zero what the masked heads of each image give: values [B H ...], head_score [B H]."""
    if head_score is None:
        return values
    alive = torch.isfinite(head_score).to(values.dtype)
    return values * alive.reshape(*alive.shape, *[1] * (values.dim() - 2))


def token_sizes(state: TokenState, num_prefix: int) -> Tensor | None:
    """Patches behind every token, prefix included (1 each): [B n] -> [B P+n]; None while all are one."""
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
    watch: bool = False,
    kernel: ScoredAttention | None = None,
) -> tuple[Tensor, TokenState, Tensor | None]:
    """One block of the cascade: attention, score, removal, MLP.

    Args:
        view: The host's block.
        method: What scores and reduces.
        step: How many patches leave this block and whether it is scored.
        x: [B P+n C] tokens entering.
        state: What is known about the n patches.
        num_prefix: P.
        extra: Keyword arguments the host gave its block.
        watch: Also return the attention probabilities (calibration, pictures).
        kernel: What scores column maxima; None for torch's own operations.

    Returns:
        Tokens [B P+keep C], the new state, and the attention [B H N N] if watched.
    """
    x, state, probs = _attend(view, method, step, x, state, num_prefix, extra, watch, kernel)
    return view.mlp_residual(x), state, probs


def _attend(
    view: BlockView,
    method: Method,
    step: BlockStep,
    x: Tensor,
    state: TokenState,
    num_prefix: int,
    extra: HostArguments,
    watch: bool,
    kernel: ScoredAttention | None,
) -> tuple[Tensor, TokenState, Tensor | None]:
    """The first half of the block. Apart, so that query, key and value are gone when the MLP starts."""
    inputs = view.attention_inputs(x, state.positions if step.pruned else None, extra)
    attended = attend(
        inputs,
        sizes=token_sizes(state, num_prefix) if method.proportional else None,
        evidence=method.evidence if step.score else "none",
        num_prefix=num_prefix,
        watch=watch,
        kernel=kernel,
    )
    state, out = _account(method, step, state, attended.out, attended.evidence, num_prefix)
    x = view.attention_residual(x, inputs, out)
    if step.keep < state.positions.shape[1]:
        x, state = method.reduce(x, state, inputs, step, num_prefix)
    return x, state, attended.probs


def _account(
    method: Method, step: BlockStep, state: TokenState, out: Tensor, evidence: Tensor | None, num_prefix: int
) -> tuple[TokenState, Tensor]:
    """Accumulate the scores of one block; in the research mode also mask its lowest heads, for good."""
    if evidence is None:
        return state, out
    evidence = only_alive(evidence, state.head_score)
    state = method.observe(state, evidence, num_prefix)
    if step.mask_heads is None:
        return state, out
    total = head_score(evidence) if state.head_score is None else state.head_score + head_score(evidence)
    left = drop_lowest_heads(total, step.mask_heads)
    return state._replace(head_score=left), only_alive(out, left)


def full_grid(x: Tensor, state: TokenState, num_prefix: int) -> Tensor:
    """Every patch in its original place: [B P+n C] -> [B P+N0 C].

    A merged patch shows the token that carries it; a removed one the value it had when it left.
    """
    if state.carrier is not None:
        return take_tokens(x, state.carrier, num_prefix)
    assert state.departed is not None, "the cascade was not asked to remember departing patches"
    grid = scatter_patches(state.departed, state.positions, x[:, num_prefix:])
    return torch.cat([x[:, :num_prefix], grid], dim=1)
