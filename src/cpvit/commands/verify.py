"""``cpvit verify``: is a model reproduced exactly with everything kept, and does a plan fit it?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cpvit.adapters import Host
from cpvit.commands.common import open_model, set_seed, write_record
from cpvit.commands.options import ModelOptions
from cpvit.plans.macs import host_macs
from cpvit.plans.plan import Plan
from cpvit.pruning.opening import unprune_host
from cpvit.pruning.prune import prune_host
from cpvit.pruning.verify import Verification, VerificationError, verify_host

MACS_ERROR = 0.005
"""Share of the dense MACs by which a plan may be off what torch counts on the pruned model."""


@dataclass(frozen=True)
class PlanVerification(Verification):
    """A model that passed, and a plan that was applied to it."""

    plan: Plan
    macs_ratio: float
    """MACs of the pruned model over those of the dense one, counted by torch."""


def run(model: ModelOptions, seed: int = 0, plan: Path | None = None, json: Path | None = None) -> None:
    """Check that, with everything kept, the pruned model's output equals the model's own.

    Args:
        seed: Of the random image, and of the weights without a checkpoint.
        plan: Also check that this plan, written by ``cpvit plan``, is for the model and costs what it says.
        json: Write the record behind what is printed to this file.
    """
    set_seed(seed)
    loaded = None if plan is None else Plan.load(plan)
    host = open_model(model, weights_needed=False)
    result = verify_host(host, seed=seed)
    if not result.passed:
        write_record(result, json)
        raise VerificationError(result.summary())
    if loaded is not None:
        result = _with_plan(host, loaded, result)
    write_record(result, json)
    print(result.summary())
    if isinstance(result, PlanVerification):
        print(f"{plan}: fits, {100 * result.macs_ratio:.2f}% of the dense MACs")


def _with_plan(host: Host, plan: Plan, result: Verification) -> PlanVerification:
    """Apply the plan and count the MACs.

    Raises:
        ValueError: It is for another model.
        VerificationError: It does not cost what it says.
    """
    dense = host_macs(host)
    prune_host(host, plan.uncorrected, verify=False)
    ratio = host_macs(host) / dense
    unprune_host(host)
    if abs(ratio - plan.macs_ratio) > MACS_ERROR:
        raise VerificationError(
            f"the plan says {plan.macs_ratio:.4f} of the dense MACs and {ratio:.4f} were counted on the pruned model; "
            "it was changed by hand or made by another version: make a new plan"
        )
    return PlanVerification(**dataclasses.asdict(result), plan=plan, macs_ratio=ratio)
