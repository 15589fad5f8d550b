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

from collections.abc import Callable, Sequence
from itertools import accumulate

from cpvit.macs import CostModel

RAMP_START = 7 / 18
"""First over last ratio of the released ramp: (1 - 5/12) / (1 + 6/12 ) = 7/18."""

MACS_TOLERANCE = 0.005
"""A MACs budget is hit within this share of it."""


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


def for_keep_rate(num_patches: int, shape: Sequence[float], keep_rate: float) -> tuple[int, ...]:
    """Patches leaving each block so that ``keep_rate`` of them is left at the end."""
    return kept(num_patches, shape, (1 - keep_rate) / shape[-1])


def for_macs(costs: CostModel, shape: Sequence[float], target: float, *, dense: int) -> tuple[int, ...]:
    """Patches leaving each block so that the model spends ``target`` of ``dense`` MACs.

    Raises:
        ValueError: The budget cannot be met by pruning patches.
    """
    return solve_macs(costs, lambda strength: kept(costs.num_patches, shape, strength), target * dense, dense)


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
    low, high = 0.0, _strongest(costs, counts)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.total(counts(middle)) > budget else (low, middle)
    patches = _settle(costs, counts(high), budget)
    miss = abs(costs.total(patches) - budget)
    if miss > MACS_TOLERANCE * budget:
        least, most = costs.total([1] * len(costs.blocks)) / dense, costs.dense / dense
        raise ValueError(
            f"macs={budget / dense:.4g} cannot be met by pruning patches: this model can spend from {least:.4g} to "
            f"{most:.4g} of its dense MACs, nearest here is {costs.total(patches) / dense:.4g}; choose a value in "
            "that range (or give keep_rate instead)"
        )
    return patches


def _strongest(costs: CostModel, counts: Callable[[float], tuple[int, ...]]) -> float:
    """A strength beyond which nothing changes."""
    strength = 1.0
    while counts(strength) != counts(2 * strength):
        strength *= 2
    return strength


def _settle(costs: CostModel, patches: tuple[int, ...], budget: float) -> tuple[int, ...]:
    """Move single patches in or out of single blocks while that brings the cost nearer to the budget."""
    best, error = patches, abs(costs.total(patches) - budget)
    while True:
        options = _neighbours(best, costs.num_patches)
        nearest = min(options, key=lambda option: abs(costs.total(option) - budget), default=best)
        if abs(costs.total(nearest) - budget) >= error:
            return best
        best, error = nearest, abs(costs.total(nearest) - budget)


def _neighbours(patches: tuple[int, ...], num_patches: int) -> list[tuple[int, ...]]:
    """Schedules that differ by one patch in one block and still never rise."""
    found = []
    for block, count in enumerate(patches):
        before = patches[block - 1] if block else num_patches
        after = patches[block + 1] if block + 1 < len(patches) else 1
        for other in (count - 1, count + 1):
            if after <= other <= before:
                found.append((*patches[:block], other, *patches[block + 1 :]))
    return found
