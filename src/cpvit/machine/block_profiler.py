"""Time blocks of the real model alone, at a few numbers of tokens, with a method."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cpvit.adapters import Host
from cpvit.core import BlockStep, Method, TokenState, initial_state, run_block
from cpvit.machine.environment import describe_environment
from cpvit.machine.timer import OnMessage, Run, Timer, least_seconds
from cpvit.machine.timing_cache import TimingCache, cache_folder
from cpvit.plans.schedules import halved_at_most

TIMES_VERSION = 1


def random_images(host: Host, batch_size: int, seed: int = 0) -> Tensor:
    """[B 3 H W] noise on the model's device and in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, *host.image_shape, generator=generator)
    return images.to(host.device, host.dtype)


class _Given(NamedTuple):
    """What the host gave a block."""

    x: Tensor
    extra: dict[str, object]


class BlockProfiler:
    """Blocks of an untouched model, to be timed alone with a method.

    Args:
        host: The model; it is run, and left as it is.
        method: What scores and removes.
        batch_size: Images per forward.
        on_message: Called before something is measured.
        timer: Times runs.
    """

    def __init__(
        self,
        host: Host,
        method: Method,
        batch_size: int,
        *,
        on_message: OnMessage = lambda _: None,
        timer: Timer | None = None,
    ) -> None:
        self.host = host
        self.method = method
        self.batch_size = batch_size
        self.on_message = on_message
        looks = [(type(block.module), block.costs()) for block in host.blocks]
        self.kinds = tuple(looks.index(look) for look in looks)
        """For every block, the first block that is built like it."""
        subject = self._subject(host.device, host.dtype)
        name = f"times-{hashlib.sha256(subject.encode()).hexdigest()[:16]}.json"
        watch = least_seconds if timer is None else timer
        self.cache = TimingCache(cache_folder() / name, subject, host.device, watch)

    def _subject(self, device: torch.device, dtype: torch.dtype) -> str:
        here = describe_environment(device, dtype, seed=0)
        costs = sorted({str(tuple(block.costs())) for block in self.host.blocks})
        return (
            f"{self.host.name}, {self.host.depth} blocks {' '.join(costs)}, {self.host.num_tokens} tokens, batch "
            f"{self.batch_size}, {here.dtype} on {here.device_name}, {here.threads} threads, torch "
            f"{here.versions['torch']}, version {TIMES_VERSION}"
        )

    def seconds(self, wanted: Sequence[Piece]) -> dict[Piece, float]:
        """Time of every piece; what is not known yet is measured."""
        names = {self._name(piece): piece for piece in wanted}
        if missing := self.cache.missing(list(names)):
            self.on_message(
                f"timing {len(missing)} pieces of {self.host.name} at batch {self.batch_size}, once: kept in "
                f"{self.cache.path}"
            )
            with self.host.in_eval_mode(), torch.inference_mode():
                runs = {name: self._run(names[name]) for name in missing}
                self.cache.measure(runs, self._run(Piece("mlp", 0, self.host.num_patches)))
        return {piece: self.cache.known[name] for name, piece in names.items()}

    def _name(self, piece: Piece) -> str:
        if piece.kind == "model":
            return "model"
        owner = "" if piece.kind == "mlp" else f"{self.method.name} "
        change = "" if piece.keep is None else f" to {piece.keep}"
        return f"block {piece.block}: {owner}{piece.kind} {piece.patches}{change}"

    def _run(self, piece: Piece) -> Run:
        if piece.kind == "model":
            images = random_images(self.host, self.batch_size)
            return lambda: self.host.model(images)
        view = self.host.blocks[piece.block]
        x, state = self._state(piece.block, piece.patches)
        if piece.kind == "mlp":
            return lambda: view.mlp_residual(x)
        keep = piece.patches if piece.keep is None else piece.keep
        scored = self.method.evidence != "none" and piece.kind != "plain"
        step = self._step(keep, score=scored, pruned=piece.patches < self.host.num_patches)
        extra = self._given[piece.block].extra
        return lambda: run_block(
            view, self.method, step, x, state, num_prefix=self.host.num_prefix, extra=extra
        )

    def _step(self, keep: int, *, score: bool, pruned: bool) -> BlockStep:
        return BlockStep(keep, score=score, pruned=pruned, depth=0.5)

    def _state(self, block: int, patches: int) -> tuple[Tensor, TokenState]:
        """Tokens and state as they are when ``patches`` are left, made by the method itself."""
        x, extra = self._given[block]
        state = initial_state(x, self.host.num_prefix, track_carrier=self.method.merges, keep_departed=False)
        for keep in _way_down(self.host.num_patches, patches, halves=self.method.halves):
            pruned = state.positions.shape[1] < self.host.num_patches
            step = self._step(keep, score=self.method.evidence != "none", pruned=pruned)
            x, state, _ = run_block(
                self.host.blocks[block],
                self.method,
                step,
                x,
                state,
                num_prefix=self.host.num_prefix,
                extra=extra,
            )
        return x, state

    @cached_property
    def _given(self) -> dict[int, _Given]:
        """What reaches one block of every kind in a forward of the untouched model."""
        given: dict[int, _Given] = {}

        def note(number: int) -> Callable[[Any, Any, Any], None]:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                extra = {**dict(zip(self.host.positional, args[1:], strict=False)), **kwargs}
                given[number] = _Given(args[0], extra)

            return hook

        hooks = [
            self.host.blocks[number].module.register_forward_pre_hook(note(number), with_kwargs=True)
            for number in sorted(set(self.kinds))
        ]
        try:
            self.host.model(random_images(self.host, self.batch_size))
        finally:
            for hook in hooks:
                hook.remove()
        return given


class Piece(NamedTuple):
    """Something to time: a block with a method, its MLP alone, or the whole dense model."""

    kind: Literal["plain", "score", "remove", "mlp", "model"]
    block: int = 0
    patches: int = 0
    """That enter."""
    keep: int | None = None
    """That leave, where some are removed."""


def _way_down(num_patches: int, patches: int, *, halves: bool) -> list[int]:
    """Counts to go through, from all patches to ``patches``."""
    counts: list[int] = []
    left = num_patches
    while left > patches:
        left = halved_at_most([patches], left)[0] if halves else patches
        counts.append(left)
    return counts
