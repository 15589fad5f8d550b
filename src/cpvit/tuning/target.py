"""What a search must reach (:class:`Target`) and what it found (:class:`Tuned`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cpvit.plans.plan import Plan

HeadChoice: TypeAlias = Literal["damage", "cascade"]


@dataclass(frozen=True)
class Target:
    """What the plan must reach. Give exactly one."""

    macs: float | None = None
    """Fraction of the dense MACs to spend."""
    max_drop: float | None = None
    """Largest top-1 loss allowed on the (labelled) calibration images, in points; MACs are minimised."""
    min_agreement: float | None = None
    """Smallest share of calibration images with the dense model's prediction; MACs are minimised."""
    speedup: float | None = None
    """Speed-up over the dense model, measured on this machine (:func:`cpvit.tuning.speedup.tune_speedup`)."""

    def __post_init__(self) -> None:
        given = [name for name, value in dataclasses.asdict(self).items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of macs, max_drop, min_agreement and speedup, got {' and '.join(given) or 'none'}"
            )
        if self.macs is not None and not 0 < self.macs <= 1:
            raise ValueError(f"macs must be a fraction above 0 and at most 1, got {self.macs}")
        if self.max_drop is not None and self.max_drop < 0:
            raise ValueError(f"max_drop is a loss in points and must be at least 0, got {self.max_drop}")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement must be a fraction from 0 to 1, got {self.min_agreement}")
        if self.speedup is not None and self.speedup <= 1:
            raise ValueError(f"speedup must be above 1, got {self.speedup}")


@dataclass(frozen=True)
class Tuned:
    """A plan and how good it is on the calibration images it was made from."""

    plan: Plan
    kl: float
    """Nats, on the calibration images."""
    agreement: float
    distance: float
    """What the search lowers, see :func:`cpvit.measure.metrics.logit_distance`."""
    start_kl: float
    """Of the best schedule before the search ..."""
    start_distance: float
    """... and its distance."""
    evaluations: int
    """Schedules that were evaluated."""
    drop: float | None = None
    """Top-1 lost on the calibration images in points, if they have labels."""
