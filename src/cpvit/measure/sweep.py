"""Several methods at several budgets, on the same images: the honest comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias, cast

from torch import nn

from cpvit.data import Batches
from cpvit.machine.environment import Environment, describe_environment
from cpvit.machine.processes import Processes
from cpvit.measure.evaluate import Progress, no_progress, predict
from cpvit.measure.examples import (
    Disagreement,
    ExampleOptions,
    Examples,
    Gallery,
    PatchTrace,
    disagreements,
)
from cpvit.measure.metrics import agreement, kl_divergence
from cpvit.measure.outcomes import Outcomes, outcomes, right
from cpvit.plans.calibration import Calibration
from cpvit.plans.check import check_plan
from cpvit.plans.config import PruneConfig, ScheduleName
from cpvit.plans.macs import host_macs
from cpvit.plans.plan import Plan
from cpvit.pruning.opening import open_restored, unprune_host
from cpvit.pruning.prune import prune_host

Search: TypeAlias = Callable[[float], Plan]
"""Finds a plan for a fraction of the dense MACs."""


@dataclass(frozen=True)
class SweepPoint:
    """One method at one budget."""

    method: str
    macs: float
    """Asked for."""
    macs_ratio: float
    """Counted."""
    top1: float
    top5: float
    top1_lost: float
    """Points below the dense model."""
    agreement: float
    kl: float
    schedule: str
    plan: Plan
    outcomes: Outcomes
    """Of each image."""
    disagreements: tuple[Disagreement, ...] = ()
    """Images that are classified otherwise than by the dense model; at most 50."""
    traces: tuple[PatchTrace, ...] = ()
    """What became of the patches of the images of the gallery."""


@dataclass(frozen=True)
class SweepResult:
    """One run of :func:`sweep`."""

    model: str
    images: int
    dense_top1: float
    dense_top5: float
    dense_macs: int
    dense_right: str
    """A character for each image: 1 where the dense model is right."""
    points: tuple[SweepPoint, ...]
    environment: Environment
    examples: Examples | None = None
    """Pictures, if they were asked for."""


@dataclass(frozen=True)
class SweepOptions:
    """What to compare."""

    methods: tuple[str, ...]
    """Names; each with its own default schedule unless it is searched for, or named: ``tome:curve``."""
    macs: tuple[float, ...]
    """Fractions of the dense MACs."""
    plans: tuple[Plan, ...] = ()
    """Plans made before, as points of a line of their own for each method ("plan (METHOD)")."""
    seed: int = 0
    """Only recorded."""
    examples: ExampleOptions | None = None
    """What to show of single images, and the names of the classes."""


def sweep(
    model: nn.Module,
    batches: Batches,
    options: SweepOptions,
    *,
    calibration: Calibration | None = None,
    search: Mapping[str, Search] = MappingProxyType({}),
    progress: Progress = no_progress,
    processes: Processes | None = None,
) -> SweepResult:
    """Evaluate every method at every MACs budget. The model is left untouched.

    Args:
        model: An untouched model with its weights.
        batches: Labelled images to evaluate on.
        options: Methods, budgets and plans.
        calibration: Makes the schedule of the methods that follow the attention range layer-aware.
        search: By method, what finds its plan for a budget (:func:`cpvit.tuning.tune.tune` on calibration images that
            are not among the evaluated).
        progress: Shows each pass.
        processes: As for :func:`cpvit.measure.evaluate.evaluate`.

    Raises:
        ValueError: A plan is not for this model, or something does not fit; plans are checked before anything runs.
    """
    host = open_restored(model)
    for method in options.methods:
        for budget in options.macs:
            configured(method, budget)  # a misspelt schedule is refused before anything runs
    for plan in options.plans:
        check_plan(plan, host)
    dense = predict(host, batches, title="dense", progress=progress, processes=processes)
    dense_macs = host_macs(host)
    gallery = Gallery(host, dense, batches, options.examples, processes)
    points: list[SweepPoint] = []

    def add_point(name: str, asked: float, config: PruneConfig | Plan) -> None:
        plan = prune_host(host, config, calibration=calibration, verify=not points)
        pruned = predict(host, batches, title=f"{name} {asked:g}", progress=progress, processes=processes)
        points.append(
            SweepPoint(
                method=name,
                macs=asked,
                macs_ratio=host_macs(host) / dense_macs,
                top1=pruned.top(1),
                top5=pruned.top(5),
                top1_lost=dense.top(1) - pruned.top(1),
                agreement=agreement(dense, pruned),
                kl=kl_divergence(dense, pruned),
                schedule=plan.schedule,
                plan=plan,
                outcomes=outcomes(dense, pruned),
                disagreements=disagreements(dense, pruned, options.examples),
                traces=gallery.traces(host),
            )
        )
        unprune_host(host)

    for method in options.methods:
        for budget in options.macs:
            add_point(
                method, budget, search[method](budget) if method in search else configured(method, budget)
            )
    for plan in options.plans:
        add_point(f"plan ({plan.method})", plan.macs_ratio, plan)
    return SweepResult(
        model=host.name,
        images=len(dense.log_probs),
        dense_top1=dense.top(1),
        dense_top5=dense.top(5),
        dense_macs=dense_macs,
        dense_right=right(dense),
        points=tuple(points),
        environment=describe_environment(host.device, host.dtype, options.seed),
        examples=gallery.examples([point.disagreements for point in points]),
    )


def configured(method: str, macs: float) -> PruneConfig:
    """What ``tome`` or ``tome:curve`` (method and schedule) asks for at a budget."""
    name, _, schedule = method.partition(":")
    return PruneConfig(method=name, macs=macs, schedule=cast(ScheduleName, schedule or "auto"))
