"""What a user asks for (:class:`PruneConfig`) and what is then done (:class:`Plan`). Both are frozen values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

ScheduleName: TypeAlias = Literal[
    "auto", "curve", "linear-ramp", "layer-aware", "constant", "constant-fraction", "stages"
]


HeadMode: TypeAlias = Literal["slice", "mask"]


Align: TypeAlias = int | Literal["auto", "none"]
"""A number of tokens, "auto" to have it measured, or "none"."""


DEFAULT_KEEP_RATE = 0.5
"""The paper's headline: half of the patches gone at the end."""


@dataclass(frozen=True)
class PruneConfig:
    """How a model shall be pruned. Give at most one budget: ``keep_rate``, ``macs`` or ``keep_per_block``."""

    method: str = "cpvit"
    """How patches are scored and what happens to those that go."""
    keep_rate: float | None = None
    """Fraction of the patches left at the end (0.5 if no budget is given)."""
    macs: float | None = None
    """Fraction of the dense multiply-accumulates to spend."""
    keep_per_block: tuple[int, ...] | tuple[float, ...] | None = None
    """Explicit: fraction (float) or number (int) of patches that leaves each block."""
    head_keep_rate: float = 1.0
    """Fraction of the heads left at the end; below 1 needs calibration images."""
    head_correction: bool = False
    """Whether the projection of a block that loses heads makes up for them, by least squares on the calibration
    images (not in the paper); costs nothing at run time."""
    head_mode: HeadMode = "slice"
    """"slice" cuts the weights; "mask" chooses per image (research: saves no time)."""
    schedule: ScheduleName = "auto"
    """Spread over depth; "auto" is the method's own. For cpvit that is layer-aware with calibration images, else the
    curve fitted for removal at a budget of MACs and the released ramp at a keep rate; for cpvit-merge the curve fitted
    for merging; for the others that of their publication."""
    align: Align = "none"
    """Make the tokens in every block, prefix included, a multiple of this number, so that few different ones are
    left and the hardware likes them; "auto" measures which number is fastest on this machine for this model."""

    def __post_init__(self) -> None:
        budgets = [
            name for name in ("keep_rate", "macs", "keep_per_block") if getattr(self, name) is not None
        ]
        if len(budgets) > 1:
            raise ValueError(f"give one of keep_rate, macs and keep_per_block, not {' and '.join(budgets)}")
        for name in ("keep_rate", "macs", "head_keep_rate"):
            _check_fraction(name, getattr(self, name))
        _check_choice("head_mode", self.head_mode, HeadMode)
        _check_choice("schedule", self.schedule, ScheduleName)
        if self.keep_per_block is not None:
            _check_per_block(self.keep_per_block)
            if self.schedule != "auto":
                raise ValueError(
                    f"keep_per_block is a schedule of its own; leave out schedule={self.schedule!r}"
                )
        _check_align(self.align, explicit=self.keep_per_block is not None)


def _check_fraction(name: str, value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be a fraction above 0 and at most 1, got {value}")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in choices.__args__:
        raise ValueError(f"{name} must be one of {', '.join(choices.__args__)}, got {value!r}")


def _check_align(align: Align, *, explicit: bool) -> None:
    if align in ("auto", "none"):
        return
    if isinstance(align, bool) or not isinstance(align, int) or align < 1:
        raise ValueError(f"align must be a number of tokens of at least 1, auto or none, got {align!r}")
    if explicit and align > 1:
        raise ValueError(f"keep_per_block is taken as it is; leave out align={align}")


def _check_per_block(keep: tuple[float, ...]) -> None:
    if not keep:
        raise ValueError("keep_per_block is empty; give one value per block")
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in keep):
        raise ValueError(f"keep_per_block must hold fractions or whole numbers of patches, got {keep}")
    if len({isinstance(value, int) for value in keep}) > 1:
        raise ValueError(f"keep_per_block mixes numbers of patches (int) and fractions (float): {keep}")
    if any(later > earlier for earlier, later in itertools.pairwise(keep)):
        raise ValueError(f"keep_per_block must never rise (a patch that left cannot come back), got {keep}")
    if (
        any(value != value for value in keep)
        or min(keep) <= 0
        or (isinstance(keep[0], float) and max(keep) > 1)
    ):
        raise ValueError(
            f"keep_per_block must hold fractions in (0, 1] or numbers of patches >= 1, got {keep}"
        )
