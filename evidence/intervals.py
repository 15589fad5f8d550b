"""How sure a figure is, and whether two rows differ."""

from __future__ import annotations

from scipy.stats import binomtest

SIGNIFICANT = 0.05


def share(flags: str) -> float:
    """Of ones, in percent."""
    return 100 * flags.count("1") / len(flags)


def interval(flags: str) -> tuple[float, float]:
    """Wilson's 95% interval of a share, in percent."""
    found = binomtest(flags.count("1"), len(flags)).proportion_ci(method="wilson")
    return 100 * float(found.low), 100 * float(found.high)


def differ(one: str, other: str) -> bool:
    """Whether two rows are right on different shares of the same images, by McNemar's exact test at 5%.

    Raises:
        ValueError: The rows are not of the same images.
    """
    if len(one) != len(other):
        raise ValueError(f"rows of {len(one)} and {len(other)} images cannot be compared in pairs")
    gained, lost = pairs(one, other)
    return gained + lost > 0 and float(binomtest(gained, gained + lost).pvalue) < SIGNIFICANT


def pairs(one: str, other: str) -> tuple[int, int]:
    """Images that only the second is right on, and those that only the first is right on."""
    both = list(zip(one, other, strict=True))
    return both.count(("0", "1")), both.count(("1", "0"))


def lost_error(dense: str, pruned: str) -> float:
    """Standard error of the points lost, from the images on which the two differ."""
    gained, lost = pairs(dense, pruned)
    count = len(dense)
    mean = (lost - gained) / count
    variance = (lost + gained) / count - mean**2
    return 100 * float((variance / count) ** 0.5)
