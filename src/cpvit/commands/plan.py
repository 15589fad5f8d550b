"""``cpvit plan``: from a budget to the plan that stays closest to the dense model, as a readable file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpvit.commands.common import (
    build_model,
    build_preprocessing,
    is_first,
    joined,
    open_source,
    progress,
    progress_bar,
    say,
    set_seed,
    write_record,
)
from cpvit.commands.options import DataOptions, ModelOptions, PreprocessingOptions
from cpvit.commands.tables import plan_text
from cpvit.commands.terminal import show
from cpvit.data import label_map, make_loader
from cpvit.files import write_atomically
from cpvit.machine.align import best_align
from cpvit.machine.processes import Processes
from cpvit.plans.config import Align, PruneConfig
from cpvit.plans.plan import Plan
from cpvit.pruning.opening import open_restored
from cpvit.tuning.escalate import TunedEscalation, tune_escalation
from cpvit.tuning.speedup import SpeedTuned, SpeedupOptions, tune_speedup
from cpvit.tuning.target import HeadChoice, Target, Tuned
from cpvit.tuning.tune import TuneOptions, tune

USUAL_MACS = 0.6


@dataclass(frozen=True)
class PlanOptions:
    """How to search."""

    method: str = "cpvit-merge"
    """What the plan is for."""
    head_keep_rate: float = 1.0
    """Fraction of the heads left."""
    head_choice: HeadChoice = "damage"
    """Cut the heads whose loss costs least and correct the projections (damage), or the paper's (cascade)."""
    align: Align | None = None
    """Make the tokens in every block a multiple of this number; auto measures which is fastest here, and is what
    --speedup does unless told otherwise."""
    trials: int = 40
    """Schedules to evaluate at each budget."""
    seconds: float = 10.0
    """How long to measure a plan for --speedup each time."""
    escalate: bool = False
    """With --min-agreement: a hard plan for all images, and the dense model again for those it is unsure about."""


def run(
    model: ModelOptions,
    data: DataOptions,
    target: Target,
    preprocessing: PreprocessingOptions,
    out: Path,
    options: PlanOptions = PlanOptions(),
    json: Path | None = None,
) -> None:
    """Search, on calibration images, for the schedule that stays closest to the dense model at a budget.

    Interrupt it when you like: the same command line goes on where it stopped. With --speedup the budget is time: the
    blocks are timed on this machine for --batch-size, and the plan is measured before it is written; interrupted, it
    begins again, but for the times.

    Args:
        out: Where to write the plan (JSON); what the search knows is kept beside it until it is done.
        json: Write how good the plan is on the calibration images to this file.
    """
    set_seed(data.seed)
    with joined(model) as processes:
        network = build_model(model, data=data.data)
        images, labels = _images(network, data, preprocessing, labelled=target.max_drop is not None)
        if options.escalate:
            _escalate(network, images, target, options, out, json, processes)
            return
        checkpoint = out.with_name(out.name + ".search")
        request = _Request(target, options, data.batch_size, data.seed, checkpoint, processes)
        try:
            found = _search(network, images, labels, request)
        except KeyboardInterrupt:
            if target.speedup is None:
                say(f"stopped; the same command goes on from {checkpoint}")
            raise
        tuned = found.tuned if isinstance(found, SpeedTuned) else found
        if is_first(processes):
            write_atomically(out, tuned.plan.to_json())
        show(_text(tuned))
        if isinstance(found, SpeedTuned):
            show(_speed_text(found))
        say(f"plan: {out}")
        write_record(found, json, processes)


@dataclass(frozen=True)
class _Request:
    target: Target
    options: PlanOptions
    batch_size: int
    seed: int
    checkpoint: Path
    processes: Processes | None = None

    def search(self, multiple: int = 1) -> TuneOptions:
        """Options of the library's search."""
        chosen = self.options
        return TuneOptions(
            chosen.method, chosen.head_keep_rate, chosen.head_choice, chosen.trials, self.seed, multiple
        )


def _escalate(
    network: Any,
    images: torch.Tensor,
    target: Target,
    options: PlanOptions,
    out: Path,
    json: Path | None,
    processes: Processes | None,
) -> None:
    if target.min_agreement is None:
        raise ValueError(
            "--escalate goes with --min-agreement: the share of images that must be answered alike"
        )
    if options.head_keep_rate != 1 or options.align is not None:
        raise ValueError(
            "--escalate cuts no heads and aligns nothing; leave out --head-keep-rate and --align"
        )
    found = tune_escalation(network, images, target.min_agreement, method=options.method, processes=processes)
    if is_first(processes):
        write_atomically(out, found.found.to_json())
    show(_escalation_text(found, target.min_agreement))
    say(f"plan: {out}")
    write_record(found, json, processes)


def _escalation_text(found: TunedEscalation, wanted: float) -> str:
    alone = (
        "none tried"
        if found.static_macs_ratio is None
        else f"{100 * found.static_macs_ratio:.1f}% of the MACs"
    )
    held_out = (
        f"on calibration images it was not fitted on: agreement {found.agreement:.4f} ({wanted:g} wanted)"
    )
    if isinstance(found.found, Plan):
        return (
            f"one plan is cheaper than two stages here: {100 * found.macs_ratio:.2f}% of the dense MACs, agreement "
            f"{found.agreement:.4f} ({wanted:g} wanted)\n{plan_text(found.found)}"
        )
    pair = found.found
    second = "the dense model" if pair.second is None else f"a plan of {100 * pair.second.macs_ratio:.1f}%"
    return (
        f"two stages: {100 * pair.light.macs_ratio:.1f}% of the MACs for all images, {second} again for the "
        f"{100 * found.share:.1f}% whose two largest probabilities are closer than {pair.margin:.3f}\n"
        f"mean {100 * found.macs_ratio:.2f}% of the dense MACs; {held_out}; cheapest single plan: {alone}\n"
        f"{plan_text(pair.light)}"
    )


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
    network: Any, images: torch.Tensor, labels: torch.Tensor | None, request: _Request
) -> Tuned | SpeedTuned:
    target, options = request.target, request.options
    with progress_bar() as bar:
        task = bar.add_task("search", total=options.trials)

        def on_trial(count: int, best: float) -> None:
            bar.update(task, completed=count, description=f"distance {best:.4f}")

        if target.speedup is not None:
            if request.processes is not None:
                raise ValueError("--speedup is measured in one process; start it without torchrun")
            timing = SpeedupOptions(request.batch_size, options.align or "auto", seconds=options.seconds)
            return tune_speedup(
                network, images, target.speedup, request.search(), timing, on_trial=on_trial, on_message=say
            )
        search = request.search(_multiple(network, request))
        return tune(
            network,
            images,
            target,
            search,
            labels=labels,
            checkpoint=request.checkpoint,
            on_trial=on_trial,
            processes=request.processes,
        )


def _multiple(network: Any, request: _Request) -> int:
    """Tokens to align to; for an accuracy to hold, the multiple that is fastest at a usual budget."""
    align, macs = request.options.align, request.target.macs
    if align != "auto":
        return align if isinstance(align, int) else 1
    config = PruneConfig(method=request.options.method, macs=USUAL_MACS if macs is None else macs)
    return best_align(open_restored(network), config, batch_size=request.batch_size, on_message=say)


def _text(tuned: Tuned) -> str:
    drop = "" if tuned.drop is None else f", top-1 lost {tuned.drop:.2f} points"
    return "\n".join(
        [
            f"{tuned.plan.model}: {100 * tuned.plan.macs_ratio:.2f}% of the dense MACs",
            f"on the {tuned.plan.calibration_images} calibration images: KL {tuned.kl:.4f} nats "
            f"(before the search {tuned.start_kl:.4f}), agreement {tuned.agreement:.4f}{drop}; "
            f"{tuned.evaluations} schedules evaluated",
            plan_text(tuned.plan),
        ]
    )


def _speed_text(found: SpeedTuned) -> str:
    got = found.speedup
    return (
        f"measured at batch {found.batch_size} in {found.environment.dtype} on {found.environment.device_name}: "
        f"{got.median:.2f}x ({got.p10:.2f}x to {got.p90:.2f}x), {found.wanted:g}x wanted"
    )
