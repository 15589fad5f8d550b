"""What a search on a hundred images gains on others: many draws of the calibration images.

    python studies/search_seeds.py --checkpoint deit_tiny_patch16_224.safetensors --data imagenet-val-650.tar

Each draw searches on 128 images, as ``cpvit plan`` does, and is compared with the curve that needs none on the images
it did not draw. A schedule is run once for an image, however many draws ask for it. ``--json FILE`` keeps every draw.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from cpvit.adapters import open_host
from cpvit.data import Preprocessing, find_samples, make_loader
from cpvit.files import write_atomically
from cpvit.machine.environment import describe_environment
from cpvit.measure.metrics import Predictions, agreement, kl_divergence, logit_distances
from cpvit.methods import method_named
from cpvit.plans.costs import cost_model
from cpvit.plans.schedules import curve_of
from cpvit.plans.steps import make_steps
from cpvit.pruning.cascade import Cascade, keep_everything
from cpvit.pruning.install import install, uninstall
from cpvit.tuning.search import Budget, Counts, search
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint


@dataclass(frozen=True)
class Draw:
    """One draw of the calibration images; KL [nats] and agreement are of the images that were not drawn."""

    seed: int
    searched: float
    """KL of the plan that was searched."""
    curve: float
    """KL of the curve that the search started from."""
    agreement: float
    """Of the plan that was searched."""
    curve_agreement: float
    moved: bool
    """Whether the plan that was searched is not the curve."""
    patches_per_block: tuple[int, ...]
    """Of the plan that was searched."""

    @property
    def gain(self) -> float:
        return self.curve - self.searched


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--method", default="cpvit-merge")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.6, 0.5])
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write every draw into this file")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise SystemExit(
            f"--json {arguments.json}: there is no folder {arguments.json.parent}; make it first"
        )
    model = create_model(arguments.model).eval()
    load_checkpoint(model, arguments.checkpoint)
    loader = make_loader(
        find_samples(arguments.data), Preprocessing.from_model(model), labels=None, batch_size=65
    )
    runs = Runs(model, torch.cat([batch.images for batch in loader]), arguments.method)
    budgets = []
    for macs in arguments.macs:
        draws = [draw(runs, macs, arguments, seed) for seed in range(arguments.draws)]
        print(described(macs, draws), f"({len(runs.known)} schedules run so far)", flush=True)
        budgets.append({"macs": macs, "draws": [dataclasses.asdict(one) for one in draws]})
    if arguments.json is not None:
        found = record(arguments, len(runs.images), budgets)
        write_atomically(arguments.json, json.dumps(found, indent=1) + "\n")


def described(macs: float, draws: Sequence[Draw]) -> str:
    return (
        f"{macs:.0%} of the MACs, {len(draws)} draws: KL on the other images "
        f"{spread([one.searched for one in draws])} searched, {spread([one.curve for one in draws])} by the curve; "
        f"gain {spread([one.gain for one in draws])}; agreement {spread([one.agreement for one in draws])}; "
        f"the search moved in {sum(one.moved for one in draws)} draws"
    )


def record(arguments: argparse.Namespace, images: int, budgets: list[dict[str, Any]]) -> dict[str, Any]:
    """What was asked, what was found, and where."""
    here = describe_environment(torch.device("cpu"), torch.float32, seed=0)
    return {
        "model": arguments.model,
        "method": arguments.method,
        "images": images,
        "calibration": arguments.calibration,
        "trials": arguments.trials,
        "budgets": budgets,
        "environment": dataclasses.asdict(here),
    }


class Runs:
    """Predictions of a model under schedules, computed once for an image and only for the images asked for."""

    def __init__(self, model: torch.nn.Module, images: Tensor, method: str) -> None:
        self.host = open_host(model)
        self.images = images
        self.method = method_named(method)
        self.known: dict[Counts, dict[int, Tensor]] = {}
        everything = torch.arange(len(images))
        self.dense = self._run(keep_everything(self.host), everything)

    def under(self, counts: Counts, images: Tensor) -> Predictions:
        """Log-probabilities [B K] of the images [B], by their number."""
        known = self.known.setdefault(counts, {})
        missing = torch.tensor([image for image in images.tolist() if image not in known], dtype=torch.int64)
        if len(missing):
            steps = make_steps(self.method, counts, self.host.num_patches)
            rows = self._run(Cascade(self.host, self.method, steps), missing)
            known.update(zip(missing.tolist(), rows, strict=True))
        return Predictions(torch.stack([known[image] for image in images.tolist()]), None)

    @torch.inference_mode()
    def _run(self, cascade: Cascade, images: Tensor) -> Tensor:
        install(self.host, cascade)
        try:
            logits = [self.host.output(self.host.model(self.images[part])) for part in images.split(64)]
        finally:
            uninstall(self.host)
        return torch.cat(logits).log_softmax(dim=-1)


def draw(runs: Runs, macs: float, arguments: argparse.Namespace, seed: int) -> Draw:
    """Search on the images of one draw, and compare with the curve on the others."""
    order = torch.randperm(len(runs.dense), generator=torch.Generator().manual_seed(seed))
    fit, rest = order[: arguments.calibration], order[arguments.calibration :]
    host = runs.host
    budget = Budget(
        cost_model(host, method=runs.method), macs, cost_model(host).dense, empty_last=host.discards_patches
    )

    def distances(counts: Counts) -> list[float]:
        found: list[float] = logit_distances(part(runs.dense, fit), runs.under(counts, fit)).tolist()
        return found

    found = search(
        budget,
        cache(distances),
        curve=curve_of(runs.method),
        depth=host.depth,
        trials=arguments.trials,
        seed=seed,
    )
    dense = part(runs.dense, rest)
    searched, start = runs.under(found.patches, rest), runs.under(found.start, rest)
    return Draw(
        seed=seed,
        searched=kl_divergence(dense, searched),
        curve=kl_divergence(dense, start),
        agreement=agreement(dense, searched),
        curve_agreement=agreement(dense, start),
        moved=found.patches != found.start,
        patches_per_block=tuple(found.patches),
    )


def part(log_probs: Tensor, images: Tensor) -> Predictions:
    return Predictions(log_probs[images], None)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; of one draw there is none."""
    return f"{fmean(values):.4f} ± {stdev(values) if len(values) > 1 else float('nan'):.4f}"


if __name__ == "__main__":
    main()
