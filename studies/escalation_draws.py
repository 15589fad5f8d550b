"""How well does the margin found on a hundred images hold on others? Many draws of the calibration images.

    python studies/escalation_draws.py --checkpoint deit_tiny_patch16_224.safetensors --data imagenet-val-650.tar

Every plan is run once over all images; each draw then finds plan and margin on 128 of them, as
``cpvit plan --escalate`` does, and is evaluated on the others.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

import torch

from cpvit.adapters import Host, open_host
from cpvit.data import Preprocessing, find_samples, make_loader
from cpvit.plans.escalation import Escalation
from cpvit.plans.plan import Plan
from cpvit.pruning.escalation import mean_macs
from cpvit.tuning.escalate import LIGHT_MACS, STATIC_MACS, Stage, margins_for, run_stage
from cpvit.tuning.evaluator import PlanEvaluator
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
    parser.add_argument("--min-agreement", type=float, default=0.995)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--draws", type=int, default=60)
    arguments = parser.parse_args()

    model = create_model(arguments.model).eval()
    load_checkpoint(model, arguments.checkpoint)
    loader = make_loader(
        find_samples(arguments.data), Preprocessing.from_model(model), labels=None, batch_size=64
    )
    images = torch.cat([batch.images for batch in loader])
    host = open_host(model)
    evaluator = PlanEvaluator(host, images, None, arguments.method, 1.0)
    stages = [run_stage(evaluator, macs) for macs in sorted(STATIC_MACS)]
    for stage in stages:
        print(f"a plan alone at {stage.macs:.2f} of the MACs: agreement {stage.agrees.float().mean():.4f}")
    light = [stage for stage in stages if stage.macs in LIGHT_MACS]
    print(
        f"{'margin from all images':>30}: {described(*best_knowing_all(host, light, arguments.min_agreement))}"
    )
    found = [draw(host, light, arguments, seed) for seed in range(arguments.draws)]
    agreements, macs = zip(*found, strict=True)
    print(
        f"{arguments.draws} draws of {arguments.calibration}: agreement {fmean(agreements):.4f}, standard deviation "
        f"{stdev(agreements):.4f}, least {min(agreements):.4f}; mean MACs {fmean(macs):.4f}"
    )


def draw(host: Host, light: list[Stage], arguments: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Agreement and mean MACs on the images that were not drawn."""
    order = torch.randperm(len(light[0].agrees), generator=torch.Generator().manual_seed(seed))
    fit, rest = order[: arguments.calibration], order[arguments.calibration :]
    drawn = [part(stage, fit) for stage in light]
    margins = margins_for(drawn, slice(None), arguments.min_agreement)
    costs = [cost(host, stage, margin) for stage, margin in zip(drawn, margins, strict=True)]
    best = costs.index(min(costs))
    return outcome(host, part(light[best], rest), margins[best])


def best_knowing_all(host: Host, light: list[Stage], wanted: float) -> tuple[float, float]:
    """The cheapest plan and margin that hold on all images, found by trying every margin."""
    tried = [outcome(host, stage, float(margin) + 1e-6) for stage in light for margin in stage.margins]
    return min((found for found in tried if found[0] >= wanted), key=lambda found: found[1])


def part(stage: Stage, images: torch.Tensor) -> Stage:
    return Stage(stage.plan, stage.macs, stage.agrees[images], stage.margins[images])


def outcome(host: Host, stage: Stage, margin: float) -> tuple[float, float]:
    agreement = (stage.agrees | (stage.margins < margin)).float().mean().item()
    return agreement, cost(host, stage, margin)


def cost(host: Host, stage: Stage, margin: float) -> float:
    share = (stage.margins < margin).float().mean().item()
    alone, twice = extremes(host, stage.plan)
    return alone + share * (twice - alone)


@cache
def extremes(host: Host, plan: Plan) -> tuple[float, float]:
    """Mean MACs if no image, or every image, runs again."""
    pair = Escalation(plan, None, 0.0)
    return mean_macs(host, pair, 0.0), mean_macs(host, pair, 1.0)


def described(agreement: float, macs: float) -> str:
    return f"agreement {agreement:.4f}, mean MACs {macs:.4f}"


if __name__ == "__main__":
    main()
