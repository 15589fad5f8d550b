"""What calibration images tell about a model, as a value; :mod:`cpvit.pruning.calibrate` measures it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cpvit.plans.heads import HeadOutputs


@dataclass(frozen=True)
class Calibration:
    """Statistics of one model on a set of images."""

    images: int
    attention_range: tuple[float, ...]
    """Per block: mean distance, in patches, between a patch and the patch it attends to most."""
    head_scores: tuple[tuple[float, ...], ...]
    """Per block and head: T^l, the sum over tokens of the strongest attention paid to each, mean over images."""
    head_outputs: tuple[HeadOutputs, ...] | None = field(default=None, repr=False, compare=False)
    """Per block: what the heads give, to correct the projection of those that are cut; None if not asked for."""
