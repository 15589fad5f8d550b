"""Gradual pruning: over the first steps the model goes from everything kept to the plan, in a few stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from cpvit.adapters import Host
from cpvit.finetune.config import TighteningConfig
from cpvit.methods import method_named
from cpvit.plans.plan import Plan
from cpvit.plans.schedules import halved_at_most
from cpvit.plans.steps import make_steps
from cpvit.pruning.install import CascadeContainer, installed


def plan_at(plan: Plan, config: TighteningConfig, step: int) -> Plan:
    """The active plan at a step: a pure function of its number, so that a resumed run uses the same one.

    Of what the plan removes before each block leaves, stage s of S removes the share s / S; the last stage is
    the plan itself. Heads are cut from the start: their weights are parameters, which an optimizer must not lose.
    """
    if step >= config.tighten_steps:
        return plan
    stage = step * config.tighten_stages // config.tighten_steps
    return interpolated(plan, stage / config.tighten_stages)


def interpolated(plan: Plan, share: float) -> Plan:
    """The plan with the share (0 to 1) of its removals; a method that merges still halves at most per block."""
    total = plan.num_patches
    patches = tuple(total - round(share * (total - kept)) for kept in plan.patches_per_block)
    if method_named(plan.method).halves:
        patches = halved_at_most(patches, total)
    return replace(plan, patches_per_block=patches, dial=f"{plan.dial}, {share:.0%} of it")


def set_patches_(host: Host, plan: Plan) -> None:
    """Change how many patches leave each block of a pruned model, and nothing else.

    Unlike ``prune_`` this touches no parameter: cut heads stay cut, and an optimizer keeps its state.

    Raises:
        ValueError: The model is not pruned.
    """
    container = _container(host)
    if container.plan == plan:
        return
    cascade = container.cascade
    steps = make_steps(cascade.method, plan.patches_per_block, plan.num_patches, plan.mask_heads)
    container.cascade = replace(cascade, steps=steps)
    container.plan = plan


@contextmanager
def active(host: Host, plan: Plan | None) -> Iterator[None]:
    """Another plan inside the ``with``; None leaves the model as it is."""
    if plan is None:
        yield
        return
    before = _container(host).plan
    assert before is not None, "a pruned model has a plan"
    set_patches_(host, plan)
    try:
        yield
    finally:
        set_patches_(host, before)


def _container(host: Host) -> CascadeContainer:
    container = installed(host)
    if container is None:
        raise ValueError(f"{host.name} is not pruned; call prune_(model) first")
    return container
