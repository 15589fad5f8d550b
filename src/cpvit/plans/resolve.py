"""From what was asked for (:class:`PruneConfig`) to a plan for one model (:class:`Plan`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cpvit.adapters import Host
from cpvit.core import Method
from cpvit.methods import method_named
from cpvit.plans.budget import BudgetError, solve_last, solve_macs
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import DEFAULT_KEEP_RATE, PruneConfig
from cpvit.plans.costs import CostModel, cost_model
from cpvit.plans.heads import choose_heads
from cpvit.plans.plan import Plan
from cpvit.plans.schedules import (
    aligned,
    constant,
    constant_fraction,
    curve_of,
    emptied_last,
    halved_at_most,
    kept,
    layer_aware,
    linear_ramp,
    stages,
)


def make_plan(host: Host, config: PruneConfig, calibration: Calibration | None = None) -> Plan:
    """Resolve a configuration for an untouched model.

    Raises:
        ValueError: Wrong length, an unreachable budget, or calibration needed and not given.
    """
    if config.align == "auto":
        raise ValueError("align='auto' is measured: resolve it first, with cpvit.machine.align.resolve_align")
    method = method_named(config.method)
    name = _schedule_name(config, method, calibration)
    shape = _shape(host, name, calibration)
    heads, masks = _heads(host, config, shape, calibration)
    dense = cost_model(host, method=method)
    costs = dense if heads is None else cost_model(host, [len(left) for left in heads], method=method)
    patches = _patches(host, config, name, shape, costs, dense.dense)
    return Plan(
        model=host.name,
        method=config.method,
        num_patches=host.num_patches,
        num_prefix=host.num_prefix,
        patches_per_block=patches,
        num_heads=tuple(block.num_heads for block in host.blocks),
        heads=heads,
        head_correction=config.head_correction and heads is not None,
        mask_heads=masks,
        schedule=name if config.keep_per_block is None else "explicit",
        dial=_budget_text(config),
        macs_ratio=round(costs.total(patches) / dense.dense, 6),
        calibration_images=calibration.images if calibration else 0,
        align=_multiple(config),
    )


def _multiple(config: PruneConfig) -> int:
    """The number to align to; 1 for none, and for counts that were given."""
    return config.align if isinstance(config.align, int) else 1


def _schedule_name(config: PruneConfig, method: Method, calibration: Calibration | None) -> str:
    """What "auto" stands for."""
    name = method.schedule if config.schedule == "auto" else config.schedule
    if name != "auto":
        return name
    if calibration is not None:
        return "layer-aware"
    return "linear-ramp" if config.macs is None else "curve"


def _shape(host: Host, name: str, calibration: Calibration | None) -> tuple[float, ...]:
    """Shape of a schedule that has one; the linear ramp (for the heads) of one that has not."""
    if name == "layer-aware":
        if calibration is None:
            raise ValueError(
                "schedule='layer-aware' measures the attention range on images; give calibration images, or use "
                "schedule='linear-ramp', which needs none"
            )
        return layer_aware(calibration.attention_range)
    return constant(host.depth) if name == "constant" else linear_ramp(host.depth)


def _patches(
    host: Host, config: PruneConfig, name: str, shape: Sequence[float], costs: CostModel, dense: int
) -> tuple[int, ...]:
    if config.keep_per_block is not None:
        return _explicit(host, config.keep_per_block)
    if config.macs is not None:
        counts = _family(host, name, shape, costs.method, empty_last=host.discards_patches)
        return solve_macs(costs, counts, config.macs * dense, dense, multiple=_multiple(config))
    keep_rate = DEFAULT_KEEP_RATE if config.keep_rate is None else config.keep_rate
    counts = _family(host, name, shape, costs.method, empty_last=False)
    found = solve_last(counts, max(1, round(keep_rate * host.num_patches)))
    return _aligned(host, found, _multiple(config), costs.method)


def _aligned(host: Host, counts: tuple[int, ...], multiple: int, method: Method) -> tuple[int, ...]:
    if multiple == 1:
        return counts
    found = aligned(counts, host.num_prefix, multiple, host.num_patches, halves=method.halves)
    if found[-1] == host.num_patches > counts[-1]:
        raise BudgetError(
            f"align={multiple} leaves nothing to prune in {host.name}, which has {host.num_tokens} tokens; give a "
            "smaller number, or none"
        )
    return found


def _family(
    host: Host, name: str, shape: Sequence[float], method: Method, *, empty_last: bool
) -> Callable[[float], tuple[int, ...]]:
    """Schedules of one kind, by strength; the curve may let go what leaves the last block, where nothing reads it."""
    curve = curve_of(method)

    def counts(strength: float) -> tuple[int, ...]:
        if name == "curve":
            found = curve.counts(host.num_patches, host.depth, strength)
            found = emptied_last(found, host.num_patches, strength) if empty_last else found
        elif name == "constant-fraction":
            found = constant_fraction(host.num_patches, host.depth, strength)
        elif name == "stages":
            found = stages(host.num_patches, host.depth, strength)
        else:
            found = kept(host.num_patches, shape, strength)
        return halved_at_most(found, host.num_patches) if method.halves else found

    return counts


def _explicit(host: Host, keep: Sequence[float]) -> tuple[int, ...]:
    if len(keep) != host.depth:
        raise ValueError(
            f"keep_per_block has {len(keep)} entries but {host.name} has {host.depth} blocks; give {host.depth}"
        )
    if isinstance(keep[0], int):
        if keep[0] > host.num_patches:
            raise ValueError(
                f"keep_per_block keeps {keep[0]} patches but {host.name} has {host.num_patches}; give at most that"
            )
        return tuple(int(count) for count in keep)
    return tuple(max(1, round(fraction * host.num_patches)) for fraction in keep)


def _heads(
    host: Host, config: PruneConfig, shape: Sequence[float], calibration: Calibration | None
) -> tuple[tuple[tuple[int, ...], ...] | None, tuple[int, ...] | None]:
    """Heads to slice away, or how many to mask per image; at most one of the two is not None."""
    if config.head_keep_rate == 1:
        return None, None
    counts = {block.num_heads for block in host.blocks}
    if len(counts) != 1:
        raise ValueError(
            f"the head cascade needs the same number of heads in every block, got {sorted(counts)}"
        )
    keep = kept(counts.pop(), shape, (1 - config.head_keep_rate) / shape[-1])
    if config.head_mode == "mask":
        if not (method_named(config.method).cumulative and method_named(config.method).evidence == "max"):
            raise ValueError(
                f"head_mode='mask' needs the method cpvit (it scores every block), got {config.method!r}"
            )
        return None, keep
    if calibration is None:
        raise ValueError(
            f"head_keep_rate={config.head_keep_rate} needs calibration images: which heads go is decided on them, "
            "so their weights can be cut; give calibration images (unlabelled), or head_mode='mask' (saves no time)"
        )
    return choose_heads(calibration.head_scores, keep), None


def _budget_text(config: PruneConfig) -> str:
    parts = [
        f"{name}={getattr(config, name)}"
        for name in ("keep_rate", "macs")
        if getattr(config, name) is not None
    ]
    if config.keep_per_block is not None:
        parts = ["keep_per_block"]
    parts = parts or [f"keep_rate={DEFAULT_KEEP_RATE} (default)"]
    if config.head_keep_rate != 1:
        parts.append(f"head_keep_rate={config.head_keep_rate}")
    return ", ".join(parts)
