"""Record which patches survive each block of a pruned model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from cpvit.pruning.cascade import BlockHook, BlockOutput, registered_hook
from cpvit.pruning.opening import open_pruned


@dataclass
class Trace:
    """What the last forward inside :func:`record` did."""

    survivors: tuple[Tensor, ...] = ()
    """Per block [B K]: original positions, row-major over the patch grid, of the patches that leave it."""
    carriers: tuple[Tensor | None, ...] = ()
    """Per block [B N0]: for merging methods, the row of the token that carries each original patch."""
    _seen: list[BlockOutput] = field(default_factory=list, repr=False)

    def _see(self, output: BlockOutput) -> None:
        seen = [] if output.block == 0 else self._seen
        self._seen = [*seen, output._replace(tokens=output.tokens[:0])]
        self.survivors = tuple(past.state.positions for past in self._seen)
        self.carriers = tuple(past.state.carrier for past in self._seen)


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record which patches survive each block of a pruned model.

    Raises:
        ValueError: The model is not pruned.

    Example:
        >>> with record(model) as trace:
        ...     model(images)
        >>> trace.survivors[-1].shape  # [B K]
    """
    _, container = open_pruned(model)
    trace = Trace()
    with registered_hook(container.cascade, BlockHook(trace._see)):
        yield trace
