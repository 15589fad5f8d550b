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

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from math import ceil

from cpvit.macs import CostModel

RAMP_START = 7 / 18
"""First over last ratio of the released ramp: (1 - 5/12) / (1 + 6/12 ) = 7/18."""

MACS_TOLERANCE = 0.005
"""A MACs budget is hit within this share of it."""


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


def for_keep_rate(num_patches: int, shape: Sequence[float], keep_rate: float) -> tuple[int, ...]:
    """Patches leaving each block so that ``keep_rate`` of them is left at the end."""
    return kept(num_patches, shape, (1 - keep_rate) / shape[-1])


def for_macs(costs: CostModel, shape: Sequence[float], target: float, *, dense: int) -> tuple[int, ...]:
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
    costs: CostModel, counts: Callable[[float], tuple[int, ...]], budget: float, dense: int
) -> tuple[int, ...]:
    """Find the strength of a family of schedules that meets the budget, then settle the rounding.

    Args:
        costs: What a schedule costs.
        counts: Schedule of a strength; 0 prunes nothing.
        budget: MACs to spend.
        dense: MACs of the untouched model, for the message.
    """
    low, high = 0.0, _strongest(counts)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.total(counts(middle)) > budget else (low, middle)
    patches = _settle(costs, counts(high), budget)
    miss = abs(costs.total(patches) - budget)
    if miss > MACS_TOLERANCE * budget:
        least, most = costs.total(counts(_strongest(counts))) / dense, costs.dense / dense
        raise BudgetError(
            f"macs={budget / dense:.4g} cannot be met by pruning patches: this model can spend from {least:.4g} to "
            f"{most:.4g} of its dense MACs, nearest here is {costs.total(patches) / dense:.4g}; choose a value in "
            "that range (or give keep_rate instead)"
        )
    return patches


def _strongest(counts: Callable[[float], tuple[int, ...]]) -> float:
    """A strength beyond which nothing changes."""
    strength = 1.0
    while counts(strength) != counts(2 * strength):
        strength *= 2
    return strength


def _settle(costs: CostModel, patches: tuple[int, ...], budget: float) -> tuple[int, ...]:
    """Move single patches in or out while that brings the cost nearer to the budget.

    Whole stages (runs of blocks with the same count) are moved first, so that a schedule of few stages stays one;
    single blocks only if that does not meet the budget.
    """
    settled = _descend(costs, patches, budget, _stage_neighbours)
    if abs(costs.total(settled) - budget) <= MACS_TOLERANCE * budget:
        return settled
    return _descend(costs, settled, budget, _block_neighbours)


def _descend(
    costs: CostModel,
    patches: tuple[int, ...],
    budget: float,
    neighbours: Callable[[tuple[int, ...]], list[tuple[int, ...]]],
) -> tuple[int, ...]:
    best, error = patches, abs(costs.total(patches) - budget)
    while True:
        options = [option for option in neighbours(best) if _suits(option, costs)]
        nearest = min(options, key=lambda option: abs(costs.total(option) - budget), default=best)
        if abs(costs.total(nearest) - budget) >= error:
            return best
        best, error = nearest, abs(costs.total(nearest) - budget)


def _suits(patches: tuple[int, ...], costs: CostModel) -> bool:
    """Never rises, keeps at least one patch, and suits the method."""
    counts = (costs.num_patches, *patches)
    if counts[-1] < 1 or any(later > earlier for earlier, later in pairwise(counts)):
        return False
    return not costs.method.halves or patches == halved_at_most(patches, costs.num_patches)


def _stage_neighbours(patches: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Schedules in which one run of equal counts is one higher or lower."""
    stages_ = sorted(set(patches))
    return [
        tuple(count + change if count == stage else count for count in patches)
        for stage in stages_
        for change in (-1, 1)
    ]


def _block_neighbours(patches: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Schedules in which one block's count is one higher or lower."""
    return [
        (*patches[:block], patches[block] + change, *patches[block + 1 :])
        for block in range(len(patches))
        for change in (-1, 1)
    ]
