"""How the pruning is spread over depth.

The share of the patches that is gone after block l follows a *shape* over depth, scaled by one *strength*:

    gone[l] = strength * shape[l],   shape in (0, 1], not decreasing, 1 where pruning is hardest

* linear ramp (released code): r_l = r_set + (l - 5) * r_set / 12 for 12 blocks, so the first block prunes 7/18
  of what the last one does;
* layer-aware (paper): the same bounds, with the block's attention range in the place of its depth. Blocks that
  look far bear more. Cascade: the shape never falls, what is gone stays gone.

Pure Python; no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, exp

from cpvit.core import Method

RAMP_START = 7 / 18
"""First over last ratio of the released ramp: (1 - 5/12) / (1 + 6/12 ) = 7/18."""


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


@dataclass(frozen=True)
class Curve:
    """A schedule that needs no images: patches left after a share t of the blocks are

        1 / (1 + (strength * u) ** power),   u = (t - start) / (1 - start),   start = onset * exp(-strength / fade)

    so nothing leaves before ``start``, half is left where strength * u is 1, and a harder budget begins earlier.
    """

    onset: float
    """Share of the blocks before which nothing leaves, at gentle budgets."""
    fade: float
    """Strength at which the onset has fallen to a third."""
    power: float
    """How sharply patches leave once they do."""

    def counts(self, num_patches: int, depth: int, strength: float) -> tuple[int, ...]:
        """Patches that leave each block; strength 0 keeps all."""
        start = self.onset * exp(-strength / self.fade)
        reach = (max(0.0, (block + 1) / depth - start) / (1 - start) for block in range(depth))
        left = (num_patches / (1 + (strength * share) ** self.power) for share in reach)
        return tuple(accumulate((max(1, round(count)) for count in left), min))


MERGING_CURVE = Curve(onset=0.35, fade=4.0, power=1.8)
"""Of merging: fitted on DeiT-Tiny (docs/log.md)."""

REMOVAL_CURVE = Curve(onset=0.0, fade=4.0, power=0.65)
"""Of removal, which is best early; fitted on the same model."""


def curve_of(method: Method) -> Curve:
    """The curve that a method is best spread by."""
    return MERGING_CURVE if method.merges else REMOVAL_CURVE


EMPTY_AT = 0.05
"""Strength from which the last block lets all patches go but one; up to there more and more, so that no budget is
left out."""


def emptied_last(counts: Sequence[int], num_patches: int, strength: float) -> tuple[int, ...]:
    """The same with (nearly) no patch leaving the last block, where nothing reads them: its MLP is then free."""
    left = round(num_patches * (1 - min(1.0, strength / EMPTY_AT)))
    return (*counts[:-1], max(1, min(counts[-1], left)))


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
