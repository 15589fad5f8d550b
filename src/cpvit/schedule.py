"""How the pruning is spread over depth, and how hard it must be to meet a budget.

The share of the patches that is gone after block l follows a *shape* over depth, scaled by one *strength*:

    gone[l] = strength * shape[l],   shape in (0, 1], not decreasing, 1 where pruning is hardest

* linear ramp (released code): r_l = r_set + (l - 5) * r_set / 12 for 12 blocks, so the first block prunes 7/18
  of what the last one does;
* layer-aware (paper): the same bounds, with the block's attention range in the place of its depth. Blocks that
  look far bear more. Cascade: the shape never falls, what is gone stays gone.

Pure Python; no tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from math import ceil
from typing import TypeAlias

from cpvit.macs import Costs

RAMP_START = 7 / 18
"""First over last ratio of the released ramp: (1 - 5/12) / (1 + 6/12 ) = 7/18."""

ALIGNED_TOLERANCE = 0.01
"""A budget is hit within this share of it where only multiples of a number of tokens are allowed."""


class BudgetError(ValueError):
    """A MACs budget that pruning patches cannot meet."""


def linear_ramp(depth: int) -> tuple[float, ...]:
    """Shape of the released code's ramp, for any depth."""
    if depth == 1:
        return (1.0,)
    return tuple(RAMP_START + (1 - RAMP_START) * block / (depth - 1) for block in range(depth))


def layer_aware(attention_range: Sequence[float]) -> tuple[float, ...]:
    """Shape that follows the measured attention range of every block.

    Where the ranges hardly differ (spread well below their mean) there is nothing to follow, and stretching the
    differences would amplify noise: the shape then goes over into the linear ramp.
    """
    low, high = min(attention_range), max(attention_range)
    spread, mean = high - low, sum(attention_range) / len(attention_range)
    trust = min(1.0, spread / mean) if mean else 0.0
    by_depth = linear_ramp(len(attention_range))
    by_range = [RAMP_START + (1 - RAMP_START) * (reach - low) / (spread or 1.0) for reach in attention_range]
    shape = [trust * reach + (1 - trust) * ramp for reach, ramp in zip(by_range, by_depth, strict=True)]
    return tuple(accumulate(shape, max))


def constant(depth: int) -> tuple[float, ...]:
    """The same number of patches leaves every block (ToMe's schedule)."""
    return tuple((block + 1) / depth for block in range(depth))


def kept(total: int, shape: Sequence[float], strength: float) -> tuple[int, ...]:
    """Counts after each block: at least one always stays, and they never rise."""
    counts = [max(1, min(total, round(total * (1 - strength * share)))) for share in shape]
    return tuple(accumulate(counts, min))


def stages(num_patches: int, depth: int, strength: float) -> tuple[int, ...]:
    """The same fraction stays at three blocks, a quarter, half and three quarters down (EViT: blocks 4, 7, 10)."""
    places = {depth * quarter // 4 for quarter in (1, 2, 3)}
    fraction = max(0.0, 1 - strength)
    steps = (fraction if block in places else 1.0 for block in range(depth))
    return _rounded_down_the_line(num_patches, steps)


def constant_fraction(num_patches: int, depth: int, strength: float) -> tuple[int, ...]:
    """The same fraction stays in every block (PiToMe)."""
    return _rounded_down_the_line(num_patches, [max(0.0, 1 - strength)] * depth)


def _rounded_down_the_line(num_patches: int, fractions: Iterable[float]) -> tuple[int, ...]:
    return tuple(
        accumulate(fractions, lambda left, keep: max(1, ceil(left * keep - 1e-9)), initial=num_patches)
    )[1:]


def halved_at_most(counts: Sequence[int], num_patches: int) -> tuple[int, ...]:
    """The nearest schedule in which no block removes more than half of its patches."""
    return tuple(
        accumulate(counts, lambda left, want: max(min(want, left), left - left // 2), initial=num_patches)
    )[1:]


def allowed(num_prefix: int, multiple: int, num_patches: int) -> tuple[int, ...]:
    """Numbers of patches, rising, that make a multiple of ``multiple`` tokens with the prefix.

    All of them is always among them: before the first patch leaves there is nothing to choose. With a multiple
    so large that no other is left, nothing can be pruned.

    Example:
        >>> allowed(num_prefix=1, multiple=64, num_patches=196)
        (63, 127, 191, 196)
    """
    multiples = range(multiple, num_prefix + num_patches, multiple)
    return (*(tokens - num_prefix for tokens in multiples if tokens > num_prefix), num_patches)


def aligned(
    counts: Sequence[int], num_prefix: int, multiple: int, num_patches: int, *, halves: bool = False
) -> tuple[int, ...]:
    """The nearest schedule whose blocks all hold a multiple of ``multiple`` tokens, prefix included.

    Hardware works in tiles: between two multiples a token costs time and saves none. Rounding also merges
    neighbouring counts, so fewer blocks have anything to remove.

    Args:
        counts: Patches that leave each block.
        num_prefix: Tokens that never leave.
        multiple: What the number of tokens shall be a multiple of; 1 changes nothing.
        num_patches: Patches that enter the first block; this number is allowed as it is.
        halves: Whether at most half of the patches may leave one block.
    """
    grid = allowed(num_prefix, multiple, num_patches)

    def nearest(left: int, want: int) -> int:
        least = left - left // 2 if halves else 1
        options = [count for count in grid if least <= count <= left]
        return min(options, key=lambda count: (abs(count - want), count))

    return tuple(accumulate(counts, nearest, initial=num_patches))[1:]


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
