"""One forward pass through the blocks: the state of the cascade, block by block.

The state of a forward pass lives in one run and nowhere else, so nothing is left on the model and two threads do not
meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpvit.adapters import Host
from cpvit.attention import ScoredAttention
from cpvit.core import BlockStep, CPViT, Method, TokenState, full_grid, initial_state, run_block
from cpvit.plans.steps import make_steps


class PruningBypassError(RuntimeError):
    """The host was about to run its blocks without the cascade."""


class BlockOutput(NamedTuple):
    """What a hook is shown after each block."""

    block: int
    tokens: Tensor
    """[B P+n C] leaving the block."""
    state: TokenState
    probs: Tensor | None
    """[B H N N], only if the hook asked for the attention."""


@dataclass(frozen=True)
class BlockHook:
    """Called after every block of every forward; see :func:`registered_hook`."""

    see: Callable[[BlockOutput], None]
    attention: bool = False


@dataclass
class Cascade:
    """Everything one forward needs to know. Plain data; replaced, not changed, when the plan changes."""

    host: Host
    method: Method
    steps: tuple[BlockStep, ...]
    dense_features: bool = False
    checkpointing: bool = False
    hooks: list[BlockHook] = field(default_factory=list)
    kernel: ScoredAttention | None = None

    @property
    def pools_departed(self) -> bool:
        """Whether the head would read patches that have left, at the value they had then."""
        leave = self.steps[-1].keep < self.host.num_patches
        return self.dense_features and leave and self.host.pools_patches and not self.method.merges

    def start(self) -> list[_Step]:
        """One-shot steps of one forward pass."""
        if getattr(self.host.model, "grad_checkpointing", False) and torch.is_grad_enabled():
            raise PruningBypassError(
                "the model's own gradient checkpointing would run blocks without pruning; switch it off "
                "(model.set_grad_checkpointing(False)) and use prune_(..., checkpointing=True)"
            )
        run = _Run(self)
        return [_Step(run, number) for number in range(len(self.steps))]


def keep_everything(host: Host) -> Cascade:
    """A cascade in which no patch leaves and nothing is scored: it answers as the untouched model does."""
    method = CPViT()
    return Cascade(host, method, make_steps(method, [host.num_patches] * host.depth, host.num_patches))


class SharedBlocks:
    """Leading blocks that two forward passes have in common: the first keeps their tokens, the second starts there."""

    def __init__(self, count: int, tokens: Tensor | None = None) -> None:
        self.count = count
        self.tokens = tokens
        """[B P+N0 C] leaving the last of them; None until they have run."""

    def of(self, images: Tensor) -> SharedBlocks:
        """The same for some of the images [b], if the blocks have run."""
        return SharedBlocks(self.count, None if self.tokens is None else self.tokens[images])


_SHARED: ContextVar[SharedBlocks | None] = ContextVar("_SHARED", default=None)


@contextmanager
def sharing(shared: SharedBlocks) -> Iterator[None]:
    """Forward passes inside keep, or start from, the tokens of the shared blocks; compiled ones run all blocks."""
    token = _SHARED.set(shared)
    try:
        yield
    finally:
        _SHARED.reset(token)


_WALKING: ContextVar[bool] = ContextVar("_WALKING", default=False)


@contextmanager
def walking() -> Iterator[None]:
    """A method of the host that returns what leaves inner blocks runs inside: see :meth:`_Run.hand_out`."""
    token = _WALKING.set(True)
    try:
        yield
    finally:
        _WALKING.reset(token)


def is_walking() -> bool:
    """Whether such a method runs; never in a compiled graph."""
    return not torch.compiler.is_compiling() and _WALKING.get()


class _Run:
    """One forward pass: the only place where its state is kept."""

    def __init__(self, cascade: Cascade) -> None:
        self.cascade = cascade
        self.state: TokenState | None = None
        self.next_block = 0
        self.shared = None if torch.compiler.is_compiling() else _SHARED.get()
        self.first_block = 0 if self.shared is None or self.shared.tokens is None else self.shared.count
        self.hands_out_grids = cascade.dense_features and is_walking()
        self.handed_out: tuple[Tensor, Tensor] | None = None
        """The full grid that the host was given after the last block, and the tokens that really left it."""

    def hand_out(self, x: Tensor) -> Tensor:
        """What the host gets after a block, and gives to the next: the tokens x [B P+n C] that leave it.

        If it collects what leaves inner blocks and the full grid was asked for, it gets the grid [B P+N0 C], and the
        next block goes on with the tokens.
        """
        if not self.hands_out_grids:
            return x
        grid = self.for_hooks(x)
        self.handed_out = (grid, x)
        return grid

    def _take_back(self, x: Tensor) -> Tensor:
        if self.handed_out is None:
            return x
        grid, tokens = self.handed_out
        if x is not grid:
            raise PruningBypassError(
                f"{self.cascade.host.name} changes its tokens between two blocks, so the full grid of inner blocks "
                "cannot be given; prune it without dense_features"
            )
        return tokens

    def for_hooks(self, x: Tensor) -> Tensor:
        """What a forward hook on a block sees: the tokens x [B P+n C] that leave it, or the full grid if asked for."""
        host, state = self.cascade.host, self.state
        # With blocks shared between two forward passes (a search over plans) the first ones have no state.
        if state is None or not self.cascade.dense_features or x.shape[1] == host.num_tokens:
            return x
        return full_grid(x, state, host.num_prefix)

    def step(self, number: int, x: Tensor, extra: dict[str, object]) -> Tensor:
        if number != self.next_block:
            raise PruningBypassError(
                f"block {number} of a pruned model was run out of order (expected block {self.next_block}): "
                "blocks share one cascade per forward pass and cannot be repeated, skipped or checkpointed alone"
            )
        self.next_block += 1
        x = self._take_back(x)
        if number < self.first_block:
            return x
        if self.shared is not None and number == self.shared.count:
            x = self._at_the_fork(x, self.shared)
        cascade = self.cascade
        state = self._start(x, extra) if self.state is None else self.state
        x, self.state, probs = self._run_block(number, x, state, extra)
        for hook in cascade.hooks:
            hook.see(BlockOutput(number, x, self.state, probs))
        return self._finish(x, self.state) if self.next_block == len(cascade.steps) else x

    def _at_the_fork(self, x: Tensor, shared: SharedBlocks) -> Tensor:
        """The tokens entering the first block that is not shared: keep them, or take the kept ones."""
        if shared.tokens is None:
            shared.tokens = x
        return shared.tokens

    def _run_block(
        self, number: int, x: Tensor, state: TokenState, extra: dict[str, object]
    ) -> tuple[Tensor, TokenState, Tensor | None]:
        cascade = self.cascade

        def block(x: Tensor, state: TokenState) -> tuple[Tensor, TokenState, Tensor | None]:
            return run_block(
                cascade.host.blocks[number],
                cascade.method,
                cascade.steps[number],
                x,
                state,
                num_prefix=cascade.host.num_prefix,
                extra=extra,
                return_probs=any(hook.attention for hook in cascade.hooks),
                kernel=cascade.kernel,
            )

        if cascade.checkpointing and torch.is_grad_enabled():
            result: tuple[Tensor, TokenState, Tensor | None] = torch.utils.checkpoint.checkpoint(
                block, x, state, use_reentrant=False
            )
            return result
        return block(x, state)

    def _start(self, x: Tensor, extra: dict[str, object]) -> TokenState:
        host = self.cascade.host
        if reason := host.blocked(host, extra):
            raise PruningBypassError(reason)
        if x.shape[1] != host.num_tokens:
            hint = f" ({host.resizing})" if host.resizing else ""
            raise ValueError(
                f"{host.name} was pruned for {host.num_patches} patches ({host.grid[0]}x{host.grid[1]}) and got "
                f"{x.shape[1] - host.num_prefix}; give images of {host.image_shape[-2]}x{host.image_shape[-1]} "
                f"pixels, or prune the model anew for this size{hint}"
            )
        return initial_state(
            x,
            host.num_prefix,
            track_carrier=self.cascade.method.merges and self._carriers_are_read(),
            keep_departed=self.cascade.dense_features and not self.cascade.method.merges,
        )

    def _carriers_are_read(self) -> bool:
        return self._spreads_out() or bool(self.cascade.hooks)

    def _spreads_out(self) -> bool:
        """Whether the caller, or a head that pools what was merged, needs every patch."""
        cascade = self.cascade
        return cascade.dense_features or (cascade.method.merges and cascade.host.pools_patches)

    def _finish(self, x: Tensor, state: TokenState) -> Tensor:
        """Spread tokens out again where every patch is needed."""
        host = self.cascade.host
        if self._spreads_out() and state.positions.shape[1] < host.num_patches:
            return full_grid(x, state, host.num_prefix)
        return x


class _Step:
    """What a host gets instead of a block."""

    def __init__(self, run: _Run, number: int) -> None:
        self.run = run
        self.number = number

    def __call__(self, given: Tensor | list[Tensor], *args: object, **kwargs: object) -> Any:
        # Cut to one length: dynamo of torch 2.5 takes strict=False for strict.
        names = self.run.cascade.host.positional[: len(args)]
        named = dict(zip(names, args[: len(names)], strict=True))
        run, host = self.run, self.run.cascade.host
        tokens = run.step(self.number, host.tokens(given), {**named, **kwargs})
        if host.blocks[self.number].module._forward_hooks:
            self._call_hooks((given, *args), kwargs, host.returned(run.for_hooks(tokens), given))
        return host.returned(run.hand_out(tokens), given)

    def _call_hooks(self, args: tuple[object, ...], kwargs: Mapping[str, object], output: object) -> None:
        """Forward hooks on the host's block, which is not called itself, see what leaves it all the same."""
        module = self.run.cascade.host.blocks[self.number].module
        for key, hook in list(module._forward_hooks.items()):
            more = (kwargs,) if key in module._forward_hooks_with_kwargs else ()
            if hook(module, args, *more, output) is not None:
                raise PruningBypassError(
                    f"a forward hook on block {self.number} of a pruned model returns something in place of the "
                    "block's tokens, which may not fit the patches that are left; let it return None"
                )


@contextmanager
def registered_hook(cascade: Cascade, hook: BlockHook) -> Iterator[None]:
    """Show every block of every forward inside the ``with`` to ``hook``."""
    cascade.hooks.append(hook)
    try:
        yield
    finally:
        cascade.hooks.remove(hook)
