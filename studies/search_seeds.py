"""What a search on a hundred images gains on others: many draws of the calibration images.

    python studies/search_seeds.py --checkpoint deit_tiny_patch16_224.safetensors --data imagenet-val-650.tar

Each draw searches on 128 images, as ``cpvit plan`` does, and is compared with the curve that needs none on the images
it did not draw. A schedule is run once for an image, however many draws ask for it.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

from cpvit.adapters import open_host
from cpvit.data import Preprocessing, find_samples, make_loader
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


def main() -> None:
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
    arguments = parser.parse_args()

    model = create_model(arguments.model).eval()
    load_checkpoint(model, arguments.checkpoint)
    loader = make_loader(
        find_samples(arguments.data), Preprocessing.from_model(model), labels=None, batch_size=65
    )
    runs = Runs(model, torch.cat([batch.images for batch in loader]), arguments.method)
    for macs in arguments.macs:
        found = [draw(runs, macs, arguments, seed) for seed in range(arguments.draws)]
        searched, curve, agreed, moved = zip(*found, strict=True)
        gains = [before - after for before, after in zip(curve, searched, strict=True)]
        print(
            f"{macs:.0%} of the MACs, {arguments.draws} draws: KL on the other images {spread(searched)} searched, "
            f"{spread(curve)} by the curve; gain {spread(gains)}; agreement {spread(agreed)}; the search moved in "
            f"{sum(moved)} draws ({len(runs.known)} schedules run so far)",
            flush=True,
        )


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


def draw(
    runs: Runs, macs: float, arguments: argparse.Namespace, seed: int
) -> tuple[float, float, float, bool]:
    """KL of the plan that was searched and of the curve, agreement of the former, and whether the two differ."""
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
    moved = found.patches != found.start
    return kl_divergence(dense, searched), kl_divergence(dense, start), agreement(dense, searched), moved


def part(log_probs: Tensor, images: Tensor) -> Predictions:
    return Predictions(log_probs[images], None)


def spread(values: tuple[float, ...] | list[float]) -> str:
    return f"{fmean(values):.4f} ± {stdev(values):.4f}"


if __name__ == "__main__":
    main()
