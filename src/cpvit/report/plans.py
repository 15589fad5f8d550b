"""A plan as a curve over the blocks."""

from __future__ import annotations

from dataclasses import dataclass

from cpvit.report.fields import Fields


@dataclass(frozen=True)
class PlanCurve:
    """What leaves each block under one plan."""

    method: str
    macs: float
    """Fraction of the dense MACs."""
    schedule: str
    tokens: tuple[int, ...]
    """Tokens that leave each block, prefix tokens included; the first is what enters."""
    heads: tuple[int, ...]
    """Heads that work in each block."""
    all_heads: tuple[int, ...]

    @property
    def title(self) -> str:
        """Its name where several are listed."""
        return f"{self.method} at {100 * self.macs:.1f}%"

    @property
    def cuts_heads(self) -> bool:
        """Whether any head is gone."""
        return self.heads != self.all_heads


def plan_curve(plan: Fields, method: str | None = None) -> PlanCurve:
    """Of a plan as JSON."""
    prefix = plan.count("num_prefix")
    every = plan.counts("num_heads")
    left = every
    if "heads" in plan:
        left = tuple(len(kept) for kept in plan.values["heads"])
    elif "mask_heads" in plan:
        left = plan.counts("mask_heads")
    patches = (plan.count("num_patches"), *plan.counts("patches_per_block"))
    return PlanCurve(
        method=method or plan.text("method"),
        macs=plan.number("macs_ratio") if "macs_ratio" in plan else 1.0,
        schedule=plan.text("schedule") if "schedule" in plan else "explicit",
        tokens=tuple(prefix + count for count in patches),
        heads=left,
        all_heads=every,
    )
