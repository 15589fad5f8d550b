"""Find a plan and a margin: all images under the plan, those it is unsure about again by the dense model.

How often a plan errs beyond a margin is estimated, not counted: of a hundred calibration images a handful disagree with
the dense model, and their largest margin says little about the next image. One logistic regression over all budgets,
on the margin, the budget and their product, lets the errors of hard plans speak for the gentle ones. What that is worth
is in docs/log.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cpvit.adapters import Host
from cpvit.machine.processes import Processes
from cpvit.plans.config import PruneConfig
from cpvit.plans.escalation import Escalation
from cpvit.plans.plan import Plan
from cpvit.plans.resolve import make_plan
from cpvit.pruning.escalation import mean_macs, prediction_margin
from cpvit.pruning.opening import open_restored
from cpvit.tuning.evaluator import PlanEvaluator

LIGHT_MACS = (0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
"""Budgets tried for the first stage."""
STATIC_MACS = (0.95, 0.9, 0.85, 0.8, 0.75, *LIGHT_MACS)
"""Budgets tried for a plan alone."""
CAUTION = 0.9
"""Share of the allowed disagreement that is estimated to be used up."""


@dataclass(frozen=True)
class Stage:
    """A plan and what it does to the calibration images."""

    plan: Plan
    macs: float
    """Fraction of the dense MACs that was asked for."""
    agrees: Tensor
    """[B] whether the prediction is the dense model's."""
    margins: Tensor
    """[B] difference of the two largest probabilities."""

    @property
    def agreement(self) -> float:
        """With half an image in error added: none in a hundred is not none ever."""
        return 1 - (float((~self.agrees).sum()) + 0.5) / (len(self.agrees) + 1)


@dataclass(frozen=True)
class TunedEscalation:
    """What was found, and how it does on calibration images that it was not fitted on."""

    found: Escalation | Plan
    """A plan where one plan alone is cheaper."""
    macs_ratio: float
    """Mean over the calibration images."""
    agreement: float
    """On images not used to choose the margin: each half of them with the margin of the other."""
    share: float
    """Of the images that ran again; 0 for one plan."""
    static_macs_ratio: float | None
    """Cheapest single plan that holds the agreement; None if none tried does."""
    calibration_images: int


def tune_escalation(
    model: nn.Module,
    images: Tensor,
    min_agreement: float,
    *,
    method: str = "cpvit-merge",
    processes: Processes | None = None,
) -> TunedEscalation:
    """Find the cheapest plan and margin, or plan alone, with the dense model's prediction on enough images.

    The plans are those of the method's curve, which need no search. The model is left untouched.

    Args:
        model: A model with a classification head.
        images: [B 3 H W] calibration images, unlabelled; 128 or more.
        min_agreement: Share of images with the dense model's prediction that is wanted, below 1.
        method: What the plans are for.
        processes: Those that share the images.

    Raises:
        ValueError: An agreement of 1 cannot be promised.
    """
    if not 0 < min_agreement < 1:
        raise ValueError(f"min_agreement must be between 0 and 1 to escalate for it, got {min_agreement}")
    evaluator = PlanEvaluator(open_restored(model), images, None, method, 1.0, processes)
    stages = [run_stage(evaluator, macs) for macs in sorted(STATIC_MACS)]
    static = next((stage for stage in stages if stage.agreement >= min_agreement), None)
    light = [stage for stage in stages if stage.macs in LIGHT_MACS]
    best = min(_pairs(evaluator.host, light, min_agreement), key=lambda pair: pair.macs_ratio)
    static_macs = None if static is None else static.plan.macs_ratio
    if static is None or best.macs_ratio < static.plan.macs_ratio:
        return dataclasses.replace(best, static_macs_ratio=static_macs, calibration_images=len(images))
    return TunedEscalation(
        static.plan, static.plan.macs_ratio, static.agreement, 0.0, static_macs, len(images)
    )


def run_stage(evaluator: PlanEvaluator, macs: float) -> Stage:
    """Run the calibration images under the method's curve at a budget."""
    plan = make_plan(evaluator.host, PruneConfig(method=evaluator.method.name, macs=macs))
    got = evaluator.predict_under(plan)
    agrees = got.log_probs.argmax(dim=1) == evaluator.dense.log_probs.argmax(dim=1)
    return Stage(plan, macs, agrees, prediction_margin(got.log_probs))


def _pairs(host: Host, stages: Sequence[Stage], min_agreement: float) -> list[TunedEscalation]:
    """Every stage with its margin; validated on each half of the images with the margin of the other."""
    everything = slice(None)
    margins = margins_for(stages, everything, min_agreement)
    halves = (slice(0, None, 2), slice(1, None, 2))
    by_half = [margins_for(stages, half, min_agreement) for half in halves]
    found = []
    for number, (stage, margin) in enumerate(zip(stages, margins, strict=True)):
        share = float((stage.margins < margin).float().mean())
        pair = Escalation(stage.plan, None, margin, share)
        pair = dataclasses.replace(pair, macs_ratio=round(mean_macs(host, pair, share), 6))
        held = sum(
            int((stage.agrees[rest] | (stage.margins[rest] < fitted[number])).sum())
            for fitted, rest in zip(by_half, halves[::-1], strict=True)
        )
        agreement = held / len(stage.agrees)
        found.append(TunedEscalation(pair, pair.macs_ratio, agreement, share, None, 0))
    return found


def margins_for(stages: Sequence[Stage], images: slice, min_agreement: float) -> list[float]:
    """For every stage the smallest margin beyond which it is estimated to err seldom enough, on some of the images."""
    from sklearn.linear_model import LogisticRegression

    wrong = torch.cat([~stage.agrees[images] for stage in stages]).numpy()
    if not wrong.any():
        return [0.0 for _ in stages]
    if wrong.all():
        return [1.0 for _ in stages]
    features = [_features(stage.margins[images], stage.macs) for stage in stages]
    fitted = LogisticRegression(C=10.0, max_iter=1000).fit(torch.cat(features).numpy(), wrong)
    allowed = CAUTION * (1 - min_agreement)
    return [
        _threshold(stage.margins[images], torch.as_tensor(fitted.predict_proba(own.numpy())[:, 1]), allowed)
        for stage, own in zip(stages, features, strict=True)
    ]


def _features(margins: Tensor, macs: float) -> Tensor:
    """[B] -> [B 3], of one size: errors fall with the root of the margin, and faster at gentle budgets."""
    root = margins.double().sqrt()
    budget = torch.full_like(root, 4 * macs)
    return torch.stack([root, budget, root * budget], dim=1)


def _threshold(margins: Tensor, risk: Tensor, allowed: float) -> float:
    """The margin from which on the estimated errors add up to no more than is allowed; 1 if no image is safe."""
    order = margins.argsort(descending=True)
    safe = int((risk[order].cumsum(0) / len(margins) <= allowed).sum())
    return 1.0 if not safe else float(margins[order[safe - 1]])
