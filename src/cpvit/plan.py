"""What a user asks for (:class:`PruneConfig`) and what is then done (:class:`Plan`). Both are frozen values."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

ScheduleName: TypeAlias = Literal[
    "auto", "linear-ramp", "layer-aware", "constant", "constant-fraction", "stages"
]
HeadMode: TypeAlias = Literal["slice", "mask"]
Align: TypeAlias = int | Literal["auto", "none"]
"""A number of tokens, "auto" to have it measured, or "none"."""

DEFAULT_KEEP_RATE = 0.5
"""The paper's headline: half of the patches gone at the end."""

PLAN_VERSION = 1


@dataclass(frozen=True)
class PruneConfig:
    """How a model shall be pruned. Give at most one dial: ``keep_rate``, ``macs`` or ``keep_per_block``."""

    method: str = "cpvit"
    """How patches are scored and what happens to those that go."""
    keep_rate: float | None = None
    """Fraction of the patches left at the end (0.5 if no dial is given)."""
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
    """Spread over depth; "auto" is the method's own: for cpvit layer-aware with calibration images, else the
    linear ramp; for the others that of their publication."""
    align: Align = "none"
    """Make the tokens in every block, prefix included, a multiple of this number, so that few different ones are
    left and the hardware likes them; "auto" measures which number is fastest on this machine for this model."""

    def __post_init__(self) -> None:
        dials = [name for name in ("keep_rate", "macs", "keep_per_block") if getattr(self, name) is not None]
        if len(dials) > 1:
            raise ValueError(f"give one of keep_rate, macs and keep_per_block, not {' and '.join(dials)}")
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


@dataclass(frozen=True)
class Plan:
    """A resolved schedule for one model: readable JSON, applied as it stands."""

    model: str
    """Architecture the plan was made for."""
    method: str
    num_patches: int
    num_prefix: int
    patches_per_block: tuple[int, ...]
    """Patches that leave each block, prefix tokens not counted."""
    num_heads: tuple[int, ...]
    """Heads each block has before pruning."""
    heads: tuple[tuple[int, ...], ...] | None = None
    """Heads kept in each block; None for all."""
    head_correction: bool = False
    """Whether the projections make up for the heads that go; applying the plan then needs calibration images."""
    mask_heads: tuple[int, ...] | None = None
    """Research mode: number of heads kept per image in each block by a mask."""
    schedule: str = "explicit"
    """How the pruning was spread over depth."""
    dial: str = ""
    """What was asked for, e.g. "macs=0.6"."""
    macs_ratio: float = 1.0
    """MACs over the dense model's, by the formula."""
    calibration_images: int = 0
    align: int = 1
    """Tokens per block, prefix included, are multiples of this number; 1 if nothing was aligned. Blocks before the
    first removal hold all tokens, and the number that leaves the last block may be off to meet a budget."""
    version: int = PLAN_VERSION

    @property
    def tokens_per_block(self) -> tuple[int, ...]:
        """Tokens that leave each block, prefix included."""
        return tuple(self.num_prefix + patches for patches in self.patches_per_block)

    @property
    def heads_per_block(self) -> tuple[int, ...]:
        """Heads that work in each block."""
        return self.num_heads if self.heads is None else tuple(len(kept) for kept in self.heads)

    @property
    def uncorrected(self) -> Plan:
        """The same plan for weights that hold the corrected projections already, or will be overwritten."""
        return dataclasses.replace(self, head_correction=False)

    def to_json(self) -> str:
        """Readable JSON, without loss."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read :meth:`to_json`.

        Raises:
            ValueError: Not JSON, not a plan, or a plan of a later version.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a plan: {error}") from None
        return cls(**_checked_fields(values))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by :meth:`save`; errors name the file."""
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the plan {path}: {error}") from None


def _checked_fields(values: object) -> dict[str, Any]:
    if not isinstance(values, dict) or "patches_per_block" not in values:
        raise ValueError("not a plan: expected an object with patches_per_block, as written by Plan.save")
    if not isinstance(values.get("version", 0), int):
        raise ValueError(f"version of a plan must be a whole number, got {values['version']!r}")
    if values.get("version", 0) > PLAN_VERSION:
        raise ValueError(
            f"plan version {values['version']} is newer than this cpvit reads ({PLAN_VERSION}); upgrade"
        )
    known = {field.name for field in dataclasses.fields(Plan)}
    required = {f.name for f in dataclasses.fields(Plan) if f.default is dataclasses.MISSING}
    if unknown := set(values) - known:
        raise ValueError(f"unknown fields in the plan: {', '.join(sorted(unknown))}")
    if missing := required - set(values):
        raise ValueError(f"missing fields in the plan: {', '.join(sorted(missing))}")
    found: dict[str, Any] = {name: _tuples(value) for name, value in values.items()}
    for name in ("patches_per_block", "num_heads", "mask_heads"):
        _check_counts(name, found.get(name))
    for kept in found.get("heads") or ():
        _check_counts("heads", kept)
    return found


def _check_counts(name: str, value: object) -> None:
    if value is None and name in ("mask_heads", "heads"):
        return
    if not isinstance(value, tuple) or any(type(count) is not int for count in value):
        raise ValueError(f"{name} of a plan must be a list of whole numbers, got {value!r}")


def _tuples(value: object) -> object:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
