"""The loop over blocks, installed where the host keeps its blocks.

A host iterates over its block container and calls what it gets. The cascade's containers hand out, at every
iteration, fresh one-shot steps that share one run: the state of a forward pass lives in that run and nowhere
else, so nothing is left on the model, two threads do not meet, and the host's own loop needs no change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from cpvit.adapters import Host
from cpvit.attention import ScoredAttention
from cpvit.core import BlockStep, Method, TokenState, full_grid, initial_state, run_block
from cpvit.heads import SlicedHeads
from cpvit.plan import Plan


class PruningBypassError(RuntimeError):
    """The host was about to run its blocks without the cascade."""


class Watched(NamedTuple):
    """What a watcher is shown after each block."""

    block: int
    tokens: Tensor
    """[B P+n C] leaving the block."""
    state: TokenState
    probs: Tensor | None
    """[B H N N], only if the watcher asked for the attention."""


@dataclass(frozen=True)
class Watcher:
    """Called after every block of every forward; see :func:`watching`."""

    see: Callable[[Watched], None]
    attention: bool = False


@dataclass
class Cascade:
    """Everything one forward needs to know. Plain data; replaced, not changed, when the plan changes."""

    host: Host
    method: Method
    steps: tuple[BlockStep, ...]
    dense_features: bool = False
    checkpointing: bool = False
    watchers: list[Watcher] = field(default_factory=list)
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


class _Run:
    """One forward pass: the only place where its state is kept."""

    def __init__(self, cascade: Cascade) -> None:
        self.cascade = cascade
        self.state: TokenState | None = None
        self.next_block = 0

    def step(self, number: int, x: Tensor, extra: dict[str, object]) -> Tensor:
        if number != self.next_block:
            raise PruningBypassError(
                f"block {number} of a pruned model was run out of order (expected block {self.next_block}): "
                "blocks share one cascade per forward pass and cannot be repeated, skipped or checkpointed alone"
            )
        self.next_block += 1
        cascade = self.cascade
        state = self._start(x, extra) if self.state is None else self.state
        x, self.state, probs = self._run_block(number, x, state, extra)
        for watcher in cascade.watchers:
            watcher.see(Watched(number, x, self.state, probs))
        return self._finish(x, self.state) if self.next_block == len(cascade.steps) else x

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
                watch=any(watcher.attention for watcher in cascade.watchers),
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
                f"{x.shape[1] - host.num_prefix}; give images of {host.image_shape[1]}x{host.image_shape[2]} "
                f"pixels, or prune the model anew for this size{hint}"
            )
        return initial_state(
            x,
            host.num_prefix,
            track_carrier=self.cascade.method.merges and self._carriers_are_read(),
            keep_departed=self.cascade.dense_features and not self.cascade.method.merges,
        )

    def _carriers_are_read(self) -> bool:
        return self._spreads_out() or bool(self.cascade.watchers)

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

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        names = self.run.cascade.host.positional
        return self.run.step(self.number, x, {**dict(zip(names, args, strict=False)), **kwargs})


class CascadeContainer:
    """Mixin of the containers that replace the host's own; holds the same blocks under the same names."""

    cascade: Cascade
    original: tuple[nn.Module]
    plan: Plan | None = None
    cut_heads: tuple[SlicedHeads, ...] = ()
    heads_lost: bool = False
    """Whether heads were cut whose weights are nowhere any more: the model was loaded without them."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.cascade.start())

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            raise PruningBypassError(
                f"blocks {index.start or 0} to {index.stop} of a pruned model cannot be taken out of it: they "
                "would run without pruning; call unprune_(model) first"
            )
        return list(self.children())[index]  # type: ignore[attr-defined]

    def run(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """All blocks, one after the other."""
        for step in self.cascade.start():
            x = step(x, *args, **kwargs)
        return x


class CascadeSequential(CascadeContainer, nn.Sequential):
    """For hosts that call their container."""

    def forward(self, x: Tensor) -> Tensor:
        """Blocks one after the other: [B N C] -> [B n C]."""
        return self.run(x)


class CascadeList(CascadeContainer, nn.ModuleList):
    """For hosts that iterate over their container."""


def install(host: Host, cascade: Cascade) -> CascadeContainer:
    """Put the cascade in the place of the host's block container and guard every way around it."""
    original = getattr(host.parent, host.attribute)
    container = _same_kind(original)
    container.cascade = cascade
    container.original = (original,)  # in a tuple, so that torch does not register it as a submodule
    container.train(original.training)
    setattr(host.parent, host.attribute, container)
    for name in host.forbidden:
        vars(host.model)[name] = _Forbidden(_WALKS.format(name))
    if cascade.pools_departed:
        vars(host.model)[host.head] = _Forbidden(_POOLS.format(host.head))
    for number, block in enumerate(host.blocks):
        block.module.register_forward_pre_hook(_Guard(number))
    return container


def _same_kind(original: nn.Module) -> CascadeSequential | CascadeList:
    """A container of the cascade with the same blocks under the same names (they are in the state_dict)."""
    if isinstance(original, nn.Sequential):
        return CascadeSequential(OrderedDict(original.named_children()))
    return CascadeList(original.children())


def uninstall(host: Host) -> None:
    """Undo :func:`install`."""
    container = getattr(host.parent, host.attribute)
    setattr(host.parent, host.attribute, container.original[0])
    for name in (*host.forbidden, host.head):
        vars(host.model).pop(name, None)
    for block in host.blocks:
        hooks = block.module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Guard)]:
            del hooks[key]


def installed(host: Host) -> CascadeContainer | None:
    """The cascade of a pruned model, None if the model is untouched."""
    container = getattr(host.parent, host.attribute)
    return container if isinstance(container, CascadeContainer) else None


@contextmanager
def watching(cascade: Cascade, watcher: Watcher) -> Iterator[None]:
    """Show every block of every forward inside the ``with`` to ``watcher``."""
    cascade.watchers.append(watcher)
    try:
        yield
    finally:
        cascade.watchers.remove(watcher)


def make_steps(
    method: Method, patches: Sequence[int], num_patches: int, mask_heads: Sequence[int | None] | None = None
) -> tuple[BlockStep, ...]:
    """What each block does: ``patches`` is how many leave each block.

    A cumulative method scores every block up to the last removal, any other only the blocks that remove.
    """
    before = (num_patches, *patches[:-1])
    removing = [number for number, (old, new) in enumerate(zip(before, patches, strict=True)) if new < old]
    last = removing[-1] if removing else -1
    scored = range(last + 1) if method.cumulative else removing
    masks = mask_heads or (None,) * len(patches)
    return tuple(
        BlockStep(
            keep=keep,
            score=method.evidence != "none" and (number in scored or masks[number] is not None),
            pruned=old < num_patches,
            mask_heads=masks[number],
            depth=number / len(patches),
        )
        for number, (old, keep) in enumerate(zip(before, patches, strict=True))
    )


_WALKS = (
    "{} would run the blocks without pruning; call unprune_(model) first, or use forward_features of a model "
    "pruned with dense_features=True"
)
_POOLS = (
    "{} would pool the patches that have left together with the others, since the model was pruned with "
    "dense_features=True; call forward_features, or prune it without dense_features to classify"
)


class _Forbidden:
    """Stands in for a host method that would walk the blocks by itself, or pool patches that have left."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise PruningBypassError(self.reason)


class _Guard:
    """Forward pre-hook: a block called directly would run dense and nobody would notice."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, module: nn.Module, args: object) -> NoReturn:
        raise PruningBypassError(
            f"block {self.number} ({type(module).__name__}) of a pruned model was called directly and would run "
            "without pruning; call the whole model, or unprune_(model) first; if the model's own gradient "
            "checkpointing did it, switch that off and use prune_(..., checkpointing=True)"
        )
