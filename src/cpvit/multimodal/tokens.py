"""Which tokens of an image the text model gets: those that are left in the tower, in the order of the grid.

The tower gives the full grid (``dense_features=True``), so that the model's own code between tower and text model,
which counts tokens and lays them out, runs as it is. What left the tower is taken out in front of the connector, or
behind it where the connector joins neighbours, or where the crops of an image have been packed into one sequence.

Legend: B images (or crops of images), N0 patches of one, C channels, K tokens chosen of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpvit.core import highest, take, take_tokens
from cpvit.pruning.cascade import BlockOutput, PruningBypassError

_LEFT: ContextVar[tuple[Tensor, ...] | None] = ContextVar("_LEFT", default=None)
"""Per block [B n] positions of the patches that left it, between a tower and its connector. Of one thread only."""

SPREAD = 0.6180339887
"""Multiples of the golden ratio, modulo 1, are spread evenly: equal ranks are then kept all over the image."""


def see_positions(output: BlockOutput) -> None:
    """Hook of the tower's cascade: keep the positions that leave each block."""
    before = () if output.block == 0 else (_LEFT.get() or ())
    _LEFT.set((*before, output.state.positions))


def positions_left(block: int) -> tuple[Tensor, ...]:
    """What :func:`see_positions` kept in this forward, up to a block.

    Raises:
        PruningBypassError: The tower has not run, or was pruned apart from its model.
    """
    seen = _LEFT.get()
    _LEFT.set(None)
    if seen is None or len(seen) <= block:
        raise PruningBypassError(
            "the image tower of a pruned vision-language model was pruned apart from it, or its connector was called "
            "without it; prune both together: prune_vlm_(model, ...)"
        )
    return seen[: block + 1]


def fewer(tokens: int, keep: int, patches: int) -> int:
    """How many of a number of tokens are chosen when ``keep`` of ``patches`` patches are left, rounded up."""
    return -(-tokens * keep // patches)


def ranks(left: Sequence[Tensor], patches: int) -> Tensor:
    """Number of blocks that each patch has outlasted: per block [B n] positions -> [B N0]."""
    total = torch.zeros(left[0].shape[0], patches, device=left[0].device)
    for positions in left:
        total = total.scatter_add(1, positions, torch.ones_like(positions, dtype=total.dtype))
    return total


def group_ranks(rank: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Ranks [B N0] summed over squares of factor x factor patches, row-major: [B N0/factor^2]."""
    rows, columns = grid
    squares = rank.view(-1, rows // factor, factor, columns // factor, factor)
    return squares.sum(dim=(2, 4)).flatten(1)


def of_highest_rank(rank: Tensor, keep: int) -> Tensor:
    """Indices of the highest ranks [B n], in order; of equal ones some all over the image: [B keep]."""
    spread = torch.arange(rank.shape[1], device=rank.device) * SPREAD % 1
    return highest(rank + spread, keep)


@dataclass(frozen=True)
class Choice:
    """What is chosen, of a tower that keeps ``keep`` patches of a grid after ``block``."""

    block: int
    keep: int
    grid: tuple[int, int]
    factor: int = 1

    @property
    def patches(self) -> int:
        """N0."""
        return self.grid[0] * self.grid[1]

    @property
    def groups(self) -> int:
        """Tokens of the text model that the full grid makes."""
        return self.patches // self.factor**2

    @property
    def tokens(self) -> int:
        """Tokens of the text model that are chosen of one grid."""
        return fewer(self.groups, self.keep, self.patches)


class BeforeConnector:
    """Forward pre-hook of a connector that treats each token alone: it gets the patches that are left."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The connector's first argument [B P+N0 C] -> [B P+K C]."""
        left = positions_left(self.choice.block)
        positions = left[-1].sort(dim=1).values
        prefix = args[0].shape[1] - self.choice.patches
        return take_tokens(args[0], positions, prefix), *args[1:]


class AfterConnector:
    """Forward hook of a connector that joins neighbours: of its tokens those with the most patches left are kept."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The connector's tokens [B G C] -> [B K C]."""
        choice = self.choice
        rank = group_ranks(ranks(positions_left(choice.block), choice.patches), choice.grid, choice.factor)
        return take(output, of_highest_rank(rank, choice.tokens))


class PackedCrops:
    """Stands in for LLaVA-NeXT's ``pack_image_features``, which lays the crops of an image side by side.

    The ranks of the patches are packed by the very same function, so that they lie as the features do. The tokens
    that end the rows are always kept.
    """

    name = "pack_image_features"

    def __init__(self, model: nn.Module, choice: Choice) -> None:
        self.model = model
        self.choice = choice

    def __call__(
        self,
        image_features: Sequence[Tensor],
        image_sizes: Any,
        vision_feature_select_strategy: str,
        image_newline: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Per image the features of its crops [crops N0 C] -> those of its chosen tokens [K C], and their numbers."""
        choice, pack = self.choice, getattr(type(self.model), self.name)
        rank = ranks(positions_left(choice.block), choice.patches)
        by_image = rank.unsqueeze(2).split([len(crops) for crops in image_features])
        strategy = {"vision_feature_select_strategy": vision_feature_select_strategy}
        packed, _ = pack(self.model, image_features, image_sizes, image_newline=image_newline, **strategy)
        ends = None if image_newline is None else rank.new_full((1,), torch.inf)
        ranked, _ = pack(self.model, by_image, image_sizes, image_newline=ends, **strategy)
        chosen = [features[self._of(one[:, 0])] for features, one in zip(packed, ranked, strict=True)]
        return chosen, torch.tensor([len(one) for one in chosen], device=rank.device)

    def _of(self, rank: Tensor) -> Tensor:
        """Indices of the chosen tokens of one image, of all of them [n]."""
        ends = int(rank.isinf().sum())
        keep = ends + fewer(len(rank) - ends, self.choice.keep, self.choice.patches)
        return of_highest_rank(rank[None], keep)[0]
