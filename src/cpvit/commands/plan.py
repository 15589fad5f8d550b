"""``cpvit plan``: from a budget to the schedule of least damage, as a readable file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

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
from cpvit.tune import Target, Tuned, tune


def run(
    model: ModelOptions,
    data: DataOptions,
    target: Target,
    preprocessing: PreprocessingOptions,
    out: Path,
    method: str = "cpvit-merge",
    head_keep_rate: float = 1.0,
    trials: int = 120,
    json: Path | None = None,
) -> None:
    """Search, on calibration images, for the schedule that does the least damage for a budget.

    Interrupt it when you like: the same command line goes on where it stopped.

    Args:
        out: Where to write the plan (JSON); what the search knows is kept beside it until it is done.
        method: What the plan is for.
        head_keep_rate: Fraction of the heads left at the end.
        trials: Schedules to judge for each MACs budget.
        json: Write how good the plan is on the calibration images to this file.
    """
    set_seed(data.seed)
    network = build_model(model, data=data.data)
    images, labels = _images(network, data, preprocessing, labelled=target.max_drop is not None)
    memory = out.with_name(out.name + ".search")
    try:
        tuned = _search(network, images, labels, target, method, head_keep_rate, trials, data.seed, memory)
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on from {memory}")
        raise
    write_atomically(out, tuned.plan.to_json())
    print(_text(tuned))
    say(f"plan: {out}")
    write_record(tuned, json)


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
    network: Any,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    target: Target,
    method: str,
    head_keep_rate: float,
    trials: int,
    seed: int,
    memory: Path,
) -> Tuned:
    with progress_bar() as bar:
        task = bar.add_task("search", total=trials)

        def judged(count: int, best: float) -> None:
            bar.update(task, completed=count, description=f"KL {best:.4f}")

        return tune(
            network,
            images,
            target,
            method=method,
            head_keep_rate=head_keep_rate,
            labels=labels,
            trials=trials,
            seed=seed,
            memory=memory,
            on_judged=judged,
        )


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
