"""How hard a schedule must prune to meet a budget: the strength of a family of schedules, and the rounding.

Pure Python; no tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

from cpvit.plans.costs import Costs
from cpvit.plans.schedules import aligned, allowed, halved_at_most, kept

ALIGNED_TOLERANCE = 0.01
"""A budget is hit within this share of it where only multiples of a number of tokens are allowed."""


class BudgetError(ValueError):
    """A MACs budget that pruning patches cannot meet."""


def for_keep_rate(num_patches: int, shape: Sequence[float], keep_rate: float) -> tuple[int, ...]:
    """Patches leaving each block so that ``keep_rate`` of them is left at the end."""
    return kept(num_patches, shape, (1 - keep_rate) / shape[-1])


def for_macs(costs: Costs, shape: Sequence[float], target: float, *, dense: float) -> tuple[int, ...]:
    """Patches leaving each block so that the model spends ``target`` of ``dense`` MACs.

    Raises:
        BudgetError: The budget cannot be met by pruning patches.
    """
    return solve_macs(costs, lambda strength: kept(costs.num_patches, shape, strength), target * dense, dense)


def solve_last(counts: Callable[[float], tuple[int, ...]], last: int) -> tuple[int, ...]:
    """The gentlest schedule of a family that leaves at most ``last`` patches at the end."""
    low, high = 0.0, _strongest(counts)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if counts(middle)[-1] > last else (low, middle)
    return counts(high)


def solve_macs(
    costs: Costs,
    counts: Callable[[float], tuple[int, ...]],
    budget: float,
    dense: float,
    *,
    multiple: int = 1,
) -> tuple[int, ...]:
    """Find the strength of a family of schedules that meets the budget, then settle the rounding.

    Args:
        costs: What a schedule costs; the budget may be in any unit (MACs, seconds) that it counts.
        counts: Schedule of a strength; 0 prunes nothing.
        budget: What to spend.
        dense: Cost of the untouched model, for the message.
        multiple: Tokens, prefix included, that every block's number must be a multiple of. The budget is then met
            within 1%; where no such schedule does, the number leaving the last block (it reaches that block's
            MLP and nothing after it) makes up for the rest.

    Raises:
        BudgetError: The budget cannot be met.
    """
    family = counts if multiple == 1 else _aligned_family(costs, counts, multiple)
    low, high = 0.0, _strongest(family)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.total(family(middle)) > budget else (low, middle)
    patches = _settle(costs, family(high), budget, multiple)
    tolerance = costs.tolerance if multiple == 1 else max(costs.tolerance, ALIGNED_TOLERANCE)
    if not _met(costs, patches, budget, tolerance):
        raise BudgetError(_out_of_reach(costs, family, patches, budget, dense, multiple))
    return patches


def _aligned_family(
    costs: Costs, counts: Callable[[float], tuple[int, ...]], multiple: int
) -> Callable[[float], tuple[int, ...]]:
    def family(strength: float) -> tuple[int, ...]:
        raw, halves = counts(strength), costs.method.halves
        return aligned(raw, costs.num_prefix, multiple, costs.num_patches, halves=halves)

    return family


def _out_of_reach(
    costs: Costs,
    family: Callable[[float], tuple[int, ...]],
    patches: tuple[int, ...],
    budget: float,
    dense: float,
    multiple: int,
) -> str:
    least, most = costs.total(family(_strongest(family))) / dense, costs.dense / dense
    finer = "" if multiple == 1 else f"; or align to fewer than {multiple} tokens"
    return (
        f"macs={budget / dense:.4g} cannot be met by pruning patches: this model can spend from {least:.4g} to "
        f"{most:.4g} of its dense MACs, nearest here is {costs.total(patches) / dense:.4g}; choose a value in "
        f"that range (or give keep_rate instead){finer}"
    )


def _met(costs: Costs, patches: tuple[int, ...], budget: float, tolerance: float) -> bool:
    return abs(costs.total(patches) - budget) <= tolerance * budget


def _strongest(counts: Callable[[float], tuple[int, ...]]) -> float:
    """A strength beyond which nothing changes."""
    strength = 1.0
    while counts(strength) != counts(2 * strength):
        strength *= 2
    return strength


Neighbours: TypeAlias = Callable[[tuple[int, ...]], list[tuple[int, ...]]]


def _settle(costs: Costs, patches: tuple[int, ...], budget: float, multiple: int) -> tuple[int, ...]:
    """Move counts up or down by one place while that brings the cost nearer to the budget.

    Whole stages (runs of blocks with the same count) are moved first, so that a schedule of few stages stays one;
    then single blocks, if that does not meet the budget. A place is a patch, or a multiple of tokens: those are
    coarse, so two blocks are then moved at once, and at last the last block by single patches.
    """
    grid = allowed(costs.num_prefix, multiple, costs.num_patches)
    places: list[Neighbours] = [lambda counts: _stage_neighbours(counts, grid)]
    places.append(lambda counts: _block_neighbours(counts, grid))
    if multiple > 1:
        places.append(lambda counts: _pair_neighbours(counts, grid))
        places.append(_last_neighbours)
    for neighbours in places:
        if _met(costs, patches, budget, costs.tolerance):
            break
        patches = _descend(costs, patches, budget, neighbours)
    return patches


def _descend(
    costs: Costs, patches: tuple[int, ...], budget: float, neighbours: Neighbours
) -> tuple[int, ...]:
    best, error = patches, abs(costs.total(patches) - budget)
    while True:
        options = [option for option in neighbours(best) if _suits(option, costs)]
        nearest = min(options, key=lambda option: abs(costs.total(option) - budget), default=best)
        if abs(costs.total(nearest) - budget) >= error:
            return best
        best, error = nearest, abs(costs.total(nearest) - budget)


def _suits(patches: tuple[int, ...], costs: Costs) -> bool:
    """Never rises, keeps at least one patch, and suits the method."""
    counts = (costs.num_patches, *patches)
    if counts[-1] < 1 or any(later > earlier for earlier, later in pairwise(counts)):
        return False
    return not costs.method.halves or patches == halved_at_most(patches, costs.num_patches)


def _beside(count: int, grid: Sequence[int]) -> list[int]:
    """The allowed counts next to an allowed one."""
    place = bisect_left(grid, count)
    return [grid[other] for other in (place - 1, place + 1) if 0 <= other < len(grid)]


def _stage_neighbours(patches: tuple[int, ...], grid: Sequence[int]) -> list[tuple[int, ...]]:
    """Schedules in which one run of equal counts is one place higher or lower."""
    return [
        tuple(other if count == stage else count for count in patches)
        for stage in sorted(set(patches))
        for other in _beside(stage, grid)
    ]


def _block_neighbours(patches: tuple[int, ...], grid: Sequence[int]) -> list[tuple[int, ...]]:
    """Schedules in which one block's count is one place higher or lower."""
    return [
        (*patches[:block], other, *patches[block + 1 :])
        for block in range(len(patches))
        for other in _beside(patches[block], grid)
    ]


def _pair_neighbours(patches: tuple[int, ...], grid: Sequence[int]) -> list[tuple[int, ...]]:
    """Schedules in which two blocks have moved by one place, or one of them by two."""
    return [second for first in _block_neighbours(patches, grid) for second in _block_neighbours(first, grid)]


def _last_neighbours(patches: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Schedules in which one patch more or less leaves the last block."""
    return [(*patches[:-1], patches[-1] + change) for change in (-1, 1)]
