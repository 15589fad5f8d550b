"""The loop over blocks, installed where the host keeps its blocks.

A host iterates over its block container and calls what it gets. The cascade's containers hand out, at every
iteration, fresh one-shot steps that share one run: the state of a forward pass lives in that run and nowhere
else, so nothing is left on the model, two threads do not meet, and the host's own loop needs no change.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from cpvit.adapters import Host
from cpvit.plans.plan import Plan
from cpvit.pruning.cascade import Cascade, PruningBypassError, is_walking, walking
from cpvit.pruning.heads import SlicedHeads


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
        if isinstance(index, slice) and is_walking() and not index.start:
            return self.cascade.start()[index]
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
    container.training = original.training  # its own mode only: a block may be frozen in another
    setattr(host.parent, host.attribute, container)
    for name in host.forbidden:
        vars(host.model)[name] = _Forbidden(_WALKS.format(name))
    for name in host.walkers:
        vars(host.model)[name] = _Walk(host.model, name, dense=cascade.dense_features)
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
    for name in (*host.forbidden, *host.walkers, host.head):
        vars(host.model).pop(name, None)
    for block in host.blocks:
        hooks = block.module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Guard)]:
            del hooks[key]


def installed(host: Host) -> CascadeContainer | None:
    """The cascade of a pruned model, None if the model is untouched."""
    container = getattr(host.parent, host.attribute)
    return container if isinstance(container, CascadeContainer) else None


_WALKS = "{} would run the blocks without pruning; call unprune_(model) first"


_MAPS = (
    "{} would lay the patches out as a map, and some have left; prune the model with dense_features=True, or ask for "
    "the tokens (output_fmt='NLC', reshape=False), which get fewer from block to block"
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


class _Walk:
    """Stands in for a host method that returns what leaves inner blocks, and calls it with the cascade in place.

    It gives the tokens that leave each block, fewer and fewer, or the full grid with ``dense_features=True``.
    """

    def __init__(self, model: nn.Module, name: str, *, dense: bool) -> None:
        self.model = model
        self.name = name
        self.dense = dense

    def __call__(self, *args: object, **kwargs: object) -> Any:
        method = getattr(type(self.model), self.name)
        if torch.compiler.is_compiling():
            raise PruningBypassError(f"{self.name} of a pruned model cannot be compiled; call it uncompiled")
        if not self.dense and self._makes_maps(method, args, kwargs):
            raise PruningBypassError(_MAPS.format(self.name))
        with walking():
            return method(self.model, *args, **kwargs)

    def _makes_maps(self, method: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        """Whether the host is asked for [B C H W], by either of the names its methods have for that."""
        bound = inspect.signature(method).bind(self.model, *args, **kwargs)
        bound.apply_defaults()
        return bound.arguments.get("output_fmt") == "NCHW" or bool(bound.arguments.get("reshape"))


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
