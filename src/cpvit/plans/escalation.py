"""Two plans for one model: a light one for all images, a second one for those the light one is unsure about."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpvit.files import write_atomically
from cpvit.plans.json_text import parse_json
from cpvit.plans.plan import Plan, plan_from_values

ESCALATION_VERSION = 1


@dataclass(frozen=True)
class Escalation:
    """Which images run twice, and under which plans."""

    light: Plan
    """For every image."""
    second: Plan | None
    """For images with a small margin; None is the dense model."""
    margin: float
    """An image runs again if its two largest class probabilities are closer than this."""
    share: float = 0.0
    """Share of the calibration images that ran again."""
    macs_ratio: float = 1.0
    """Mean MACs of an image over the dense model's, on the calibration images."""

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= 1:
            raise ValueError(f"margin is a difference of probabilities from 0 to 1, got {self.margin}")
        if self.second is not None and _subject(self.second) != _subject(self.light):
            raise ValueError(
                f"both plans must be for one model, got {self.light.model} and {self.second.model}; make both for "
                "the same"
            )

    @property
    def shared_blocks(self) -> int:
        """Leading blocks that both stages run alike: nothing has left before them, and no head is cut."""
        plans = (self.light,) if self.second is None else (self.light, self.second)
        if any(plan.heads is not None or plan.mask_heads is not None for plan in plans):
            return 0
        return min(_untouched(plan) for plan in plans)

    def to_json(self) -> str:
        """Readable JSON, without loss."""
        values = {"escalation": ESCALATION_VERSION, **dataclasses.asdict(self)}
        return json.dumps(values, indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_atomically(Path(path), self.to_json())


def load_plan(path: str | Path) -> Plan | Escalation:
    """Read what :meth:`Plan.save` or :meth:`Escalation.save` wrote; errors name the file.

    Raises:
        ValueError: Not a file of either kind, or of a later version.
    """
    try:
        text = Path(path).read_text()
        values = parse_json(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the plan {path}: {error}") from None
    if not isinstance(values, dict) or "escalation" not in values:
        return Plan.load(path)
    try:
        return _escalation(values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read the plan {path}: {error}") from None


def _escalation(values: dict[str, Any]) -> Escalation:
    version = values.pop("escalation")
    if not isinstance(version, int) or version > ESCALATION_VERSION:
        raise ValueError(
            f"escalation version {version} is newer than this cpvit reads ({ESCALATION_VERSION}); upgrade"
        )
    second = values.pop("second")
    return Escalation(
        light=plan_from_values(values.pop("light")),
        second=None if second is None else plan_from_values(second),
        **{name: float(value) for name, value in values.items()},
    )


def _subject(plan: Plan) -> tuple[object, ...]:
    return plan.model, plan.num_patches, plan.num_prefix, plan.num_heads


def _untouched(plan: Plan) -> int:
    """Blocks before the first that lets a patch go."""
    counts = plan.patches_per_block
    return next((block for block, count in enumerate(counts) if count < plan.num_patches), len(counts))
