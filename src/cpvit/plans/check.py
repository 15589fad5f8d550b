"""Does a plan fit a model?"""

from __future__ import annotations

import itertools

from cpvit.adapters import Host
from cpvit.plans.plan import Plan


def check_plan(plan: Plan, host: Host) -> None:
    """Raise ValueError unless the plan was made for a model like this one."""
    _expect(plan, "blocks", len(plan.patches_per_block), host.depth, host)
    _expect(plan, "patches", plan.num_patches, host.num_patches, host)
    _expect(plan, "prefix tokens", plan.num_prefix, host.num_prefix, host)
    _expect(plan, "heads per block", plan.num_heads, tuple(block.num_heads for block in host.blocks), host)
    if plan.model != host.name:
        raise ValueError(
            f"the plan was made for {plan.model} and the model is {host.name}; make a plan for it"
        )
    for what, entries in (("lists of heads", plan.heads), ("mask_heads", plan.mask_heads)):
        if entries is not None:
            _expect(plan, what, len(entries), host.depth, host)
    _check_counts(plan)


def _expect(plan: Plan, what: str, planned: object, got: object, host: Host) -> None:
    if planned != got:
        raise ValueError(
            f"the plan (for {plan.model}) has {planned} {what} and {host.name} has {got}; make a new plan"
        )


def _check_counts(plan: Plan) -> None:
    counts = (plan.num_patches, *plan.patches_per_block)
    if min(counts) < 1 or any(later > earlier for earlier, later in itertools.pairwise(counts)):
        raise ValueError(
            f"patches_per_block must never rise, from {counts[0]} down to at least 1, got {counts[1:]}"
        )
    for block, count in enumerate(plan.mask_heads or ()):
        if not 1 <= count <= plan.num_heads[block]:
            raise ValueError(
                f"mask_heads of block {block} must be within 1..{plan.num_heads[block]}, got {count}"
            )
    for block, kept in enumerate(plan.heads or ()):
        if (
            not kept
            or sorted(set(kept)) != list(kept)
            or not 0 <= kept[0] <= kept[-1] < plan.num_heads[block]
        ):
            raise ValueError(
                f"heads of block {block} must be distinct, rising, within 0..{plan.num_heads[block] - 1}, got {kept}"
            )
