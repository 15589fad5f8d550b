"""Several methods at several budgets, on the same images: the honest comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from cpvit.adapters import open_host
from cpvit.calibrate import Calibration
from cpvit.data import Batches
from cpvit.environment import Environment, describe_environment
from cpvit.evaluate import Progress, no_progress, predict
from cpvit.macs import count_macs
from cpvit.metrics import agreement, kl_divergence
from cpvit.plan import Plan, PruneConfig
from cpvit.prune import check_plan, prune_, unprune_
from cpvit.tune import Target, tune


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


@dataclass(frozen=True)
class SweepResult:
    """One run of :func:`sweep`."""

    model: str
    images: int
    dense_top1: float
    dense_top5: float
    dense_macs: int
    points: tuple[SweepPoint, ...]
    environment: Environment


def sweep(
    model: nn.Module,
    batches: Batches,
    methods: Sequence[str],
    macs: Sequence[float],
    *,
    plans: Sequence[Plan] = (),
    calibration: Calibration | None = None,
    search_images: Tensor | None = None,
    searched: Sequence[str] = (),
    trials: int = 120,
    seed: int = 0,
    progress: Progress = no_progress,
    on_judged: Callable[[str, int, float], None] = lambda title, judged, best: None,
) -> SweepResult:
    """Evaluate every method at every MACs budget. The model is left untouched.

    Args:
        model: An untouched model with its weights.
        batches: Labelled images to evaluate on.
        methods: Names; each with the schedule of its publication unless it is in ``searched``.
        macs: Fractions of the dense MACs.
        plans: Plans made before, as points of a line of their own for each method ("plan (METHOD)").
        calibration: Makes the schedule of the methods that follow the attention range layer-aware.
        search_images: [B 3 H W] calibration images for the searched plans; must not be among the evaluated.
        searched: Methods whose plan is searched for on ``search_images``.
        trials: Schedules to judge in each search.
        seed: Of the searches.
        progress: Shows each pass.
        on_judged: Told about each search.

    Raises:
        ValueError: A plan is not for this model, or something does not fit; plans are checked before anything runs.
    """
    unprune_(model)
    for plan in plans:
        check_plan(plan, open_host(model))
    dense = predict(model, batches, title="dense", progress=progress)
    dense_macs = count_macs(model)
    points: list[SweepPoint] = []

    def judge(name: str, asked: float, config: PruneConfig | Plan) -> None:
        plan = prune_(model, config, calibration=calibration, verify=not points)
        pruned = predict(model, batches, title=f"{name} {asked:g}", progress=progress)
        points.append(
            SweepPoint(
                method=name,
                macs=asked,
                macs_ratio=count_macs(model) / dense_macs,
                top1=pruned.top(1),
                top5=pruned.top(5),
                top1_lost=dense.top(1) - pruned.top(1),
                agreement=agreement(dense, pruned),
                kl=kl_divergence(dense, pruned),
                schedule=plan.schedule,
                plan=plan,
            )
        )
        unprune_(model)

    for method in methods:
        for budget in macs:
            title = f"{method} {budget:g}"
            config: PruneConfig | Plan = PruneConfig(method=method, macs=budget)
            if method in searched and search_images is not None:
                found = tune(
                    model,
                    search_images,
                    Target(macs=budget),
                    method=method,
                    trials=trials,
                    seed=seed,
                    on_judged=lambda judged, best, title=title: on_judged(title, judged, best),  # type: ignore[misc]
                )
                config = found.plan
            judge(method, budget, config)
    for plan in plans:
        judge(f"plan ({plan.method})", plan.macs_ratio, plan)
    parameter = next(model.parameters())
    return SweepResult(
        model=points[0].plan.model if points else type(model).__name__,
        images=len(dense.log_probs),
        dense_top1=dense.top(1),
        dense_top5=dense.top(5),
        dense_macs=dense_macs,
        points=tuple(points),
        environment=describe_environment(parameter.device, parameter.dtype, seed),
    )


def plot_sweep(result: SweepResult, path: Path) -> Path:
    """Top-1 lost and KL against MACs, a line per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    lost, damage = figure.subplots(1, 2)
    for method in dict.fromkeys(point.method for point in result.points):
        line = sorted((p.macs_ratio, p.top1_lost, p.kl) for p in result.points if p.method == method)
        ratios, losses, kls = zip(*line, strict=True)
        lost.plot(ratios, losses, marker="o", label=method)
        damage.plot(ratios, kls, marker="o", label=method)
    lost.set(
        xlabel="MACs of dense", ylabel="top-1 lost (points)", title=f"{result.model}, {result.images} images"
    )
    damage.set(xlabel="MACs of dense", ylabel="KL from dense (nats)", yscale="log")
    for axes in (lost, damage):
        axes.invert_xaxis()
        axes.grid(visible=True, alpha=0.3)
    damage.legend()
    figure.savefig(path, dpi=120)
    return path
