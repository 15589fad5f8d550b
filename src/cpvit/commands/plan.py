"""``cpvit plan``: from a budget to the schedule of least damage, as a readable file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpvit.adapters import open_host
from cpvit.commands.common import (
    build_model,
    build_preprocessing,
    open_source,
    progress,
    progress_bar,
    say,
    set_seed,
    write_record,
)
from cpvit.commands.options import DataOptions, ModelOptions, PreprocessingOptions
from cpvit.commands.tables import plan_text
from cpvit.data import label_map, make_loader
from cpvit.files import write_atomically
from cpvit.plan import Align, PruneConfig
from cpvit.planning import best_align
from cpvit.speedup import SpeedTuned, tune_speedup
from cpvit.tune import HeadChoice, Target, Tuned, tune

USUAL_MACS = 0.6


def run(
    model: ModelOptions,
    data: DataOptions,
    target: Target,
    preprocessing: PreprocessingOptions,
    out: Path,
    method: str = "cpvit-merge",
    head_keep_rate: float = 1.0,
    head_choice: HeadChoice = "damage",
    align: Align = "auto",
    trials: int = 120,
    seconds: float = 10.0,
    json: Path | None = None,
) -> None:
    """Search, on calibration images, for the schedule that does the least damage for a budget.

    Interrupt it when you like: the same command line goes on where it stopped. With --speedup the budget is time: the
    blocks are timed on this machine for --batch-size, and the plan is measured before it is written; interrupted, it
    begins again, but for the times.

    Args:
        out: Where to write the plan (JSON); what the search knows is kept beside it until it is done.
        method: What the plan is for.
        head_keep_rate: Fraction of the heads left.
        head_choice: Cut the heads that are missed least and make up for them (damage), or the paper's (cascade).
        align: Make the tokens in every block a multiple of this number; auto measures which is fastest here.
        trials: Schedules to judge for each budget.
        seconds: How long to measure a plan for --speedup each time.
        json: Write how good the plan is on the calibration images to this file.
    """
    set_seed(data.seed)
    network = build_model(model, data=data.data)
    images, labels = _images(network, data, preprocessing, labelled=target.max_drop is not None)
    memory = out.with_name(out.name + ".search")
    settings = _Settings(
        method, head_keep_rate, head_choice, align, trials, data.batch_size, data.seed, memory, seconds
    )
    try:
        found = _search(network, images, labels, target, settings)
    except KeyboardInterrupt:
        if target.speedup is None:
            say(f"stopped; the same command goes on from {memory}")
        raise
    tuned = found.tuned if isinstance(found, SpeedTuned) else found
    write_atomically(out, tuned.plan.to_json())
    print(_text(tuned))
    if isinstance(found, SpeedTuned):
        print(_speed_text(found))
    say(f"plan: {out}")
    write_record(found, json)


@dataclass(frozen=True)
class _Settings:
    method: str
    head_keep_rate: float
    head_choice: HeadChoice
    align: Align
    trials: int
    batch_size: int
    seed: int
    memory: Path
    seconds: float


def _images(network: Any, data: DataOptions, preprocessing: PreprocessingOptions, *, labelled: bool) -> Any:
    source = open_source(data)
    loader = make_loader(
        source.limited(data.limit, data.seed),
        build_preprocessing(network, preprocessing),
        labels=label_map(source, int(network.num_classes)) if labelled else None,
        batch_size=data.batch_size,
        num_workers=data.workers,
        skip_bad_images=data.skip_bad_images,
    )
    batches: Iterator[Any] = progress(loader, "images", len(loader))
    loaded = [(batch.images, batch.labels) for batch in batches]
    images = torch.cat([images for images, _ in loaded])
    return images, torch.cat([labels for _, labels in loaded]) if labelled else None


def _search(
    network: Any, images: torch.Tensor, labels: torch.Tensor | None, target: Target, settings: _Settings
) -> Tuned | SpeedTuned:
    with progress_bar() as bar:
        task = bar.add_task("search", total=settings.trials)

        def judged(count: int, best: float) -> None:
            bar.update(task, completed=count, description=f"distance {best:.4f}")

        common: dict[str, Any] = {
            "method": settings.method,
            "head_keep_rate": settings.head_keep_rate,
            "head_choice": settings.head_choice,
            "trials": settings.trials,
            "seed": settings.seed,
            "on_judged": judged,
        }
        if target.speedup is not None:
            return tune_speedup(
                network,
                images,
                target.speedup,
                batch_size=settings.batch_size,
                align=settings.align,
                seconds=settings.seconds,
                tell=say,
                **common,
            )
        multiple = _multiple(network, target, settings)
        return tune(
            network, images, target, labels=labels, multiple=multiple, memory=settings.memory, **common
        )


def _multiple(network: Any, target: Target, settings: _Settings) -> int:
    """Tokens to align to; for an accuracy to hold, the multiple that is fastest at a usual budget."""
    if settings.align != "auto":
        return settings.align if isinstance(settings.align, int) else 1
    macs = USUAL_MACS if target.macs is None else target.macs
    config = PruneConfig(method=settings.method, macs=macs)
    return best_align(open_host(network), config, batch_size=settings.batch_size, tell=say)


def _text(tuned: Tuned) -> str:
    drop = "" if tuned.drop is None else f", top-1 lost {tuned.drop:.2f} points"
    return "\n".join(
        [
            f"{tuned.plan.model}: {100 * tuned.plan.macs_ratio:.2f}% of the dense MACs",
            f"on the {tuned.plan.calibration_images} calibration images: KL {tuned.kl:.4f} nats "
            f"(before the search {tuned.start_kl:.4f}), agreement {tuned.agreement:.4f}{drop}; "
            f"{tuned.judged} schedules judged",
            plan_text(tuned.plan),
        ]
    )


def _speed_text(found: SpeedTuned) -> str:
    got = found.speedup
    return (
        f"measured at batch {found.batch_size} in {found.environment.dtype} on {found.environment.device_name}: "
        f"{got.median:.2f}x ({got.p10:.2f}x to {got.p90:.2f}x), {found.wanted:g}x wanted"
    )
