"""What is done to one model: a :class:`Plan`, a frozen value that is kept as readable JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpvit.files import write_atomically
from cpvit.plans.json_text import parse_json

PLAN_VERSION = 1


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
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"not a plan: {error}") from None
        return plan_from_values(values)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by :meth:`save`; errors name the file."""
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the plan {path}: {error}") from None


def plan_from_values(values: object) -> Plan:
    """The plan that :meth:`Plan.to_json` wrote, from what JSON makes of it.

    Raises:
        ValueError: Not a plan, or one of a later version.
    """
    return Plan(**_checked_fields(values))


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
