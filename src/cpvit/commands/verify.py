"""``cpvit verify``: does cpvit know this model exactly, and does a plan fit it?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cpvit.commands.common import build_model, set_seed, write_record
from cpvit.commands.options import ModelOptions
from cpvit.plans.macs import count_macs
from cpvit.plans.plan import Plan
from cpvit.pruning.prune import prune_, unprune_
from cpvit.pruning.verify import Verification, VerificationError, verify

MACS_ERROR = 0.005
"""Share of the dense MACs by which a plan may be off what torch counts on the pruned model."""


@dataclass(frozen=True)
class PlanVerification(Verification):
    """A model that is known, and a plan that was applied to it."""

    plan: Plan
    macs_ratio: float
    """Counted by torch on the pruned model."""


def run(model: ModelOptions, seed: int = 0, plan: Path | None = None, json: Path | None = None) -> None:
    """Check that, with everything kept, the pruned model's output equals the model's own.

    Args:
        seed: Of the random image, and of the weights without a checkpoint.
        plan: Also check that this plan, written by ``cpvit plan``, is for the model and costs what it says.
        json: Write the record behind what is printed to this file.
    """
    set_seed(seed)
    loaded = None if plan is None else Plan.load(plan)
    network = build_model(model, weights_needed=False)
    result = verify(network, seed=seed)
    if not result.passed:
        write_record(result, json)
        raise VerificationError(result.summary())
    if loaded is not None:
        result = _with_plan(network, loaded, result)
    write_record(result, json)
    print(result.summary())
    if isinstance(result, PlanVerification):
        print(f"{plan}: fits, {100 * result.macs_ratio:.2f}% of the dense MACs")


def _with_plan(network: nn.Module, plan: Plan, result: Verification) -> PlanVerification:
    """Apply the plan and count.

    Raises:
        ValueError: It is for another model.
        VerificationError: It does not cost what it says.
    """
    dense = count_macs(network)
    prune_(network, plan.uncorrected, verify=False)
    ratio = count_macs(network) / dense
    unprune_(network)
    if abs(ratio - plan.macs_ratio) > MACS_ERROR:
        raise VerificationError(
            f"the plan says {plan.macs_ratio:.4f} of the dense MACs and {ratio:.4f} were counted on the pruned model; "
            "it was changed by hand or made by another version: make a new plan"
        )
    return PlanVerification(**dataclasses.asdict(result), plan=plan, macs_ratio=ratio)
