"""Evaluates schedules: runs the calibration images under a plan and compares with the dense model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from cpvit.adapters import Host
from cpvit.machine.processes import Processes, gathered
from cpvit.measure.metrics import Predictions, logit_distances
from cpvit.methods import method_named
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig
from cpvit.plans.heads import least_missed
from cpvit.plans.plan import Plan
from cpvit.plans.resolve import make_plan
from cpvit.plans.steps import make_steps
from cpvit.pruning.calibrate import calibrate_host
from cpvit.pruning.cascade import Cascade
from cpvit.pruning.install import install, uninstall
from cpvit.pruning.opening import unprune_host
from cpvit.pruning.prune import prune_host
from cpvit.tuning.checkpoint import SearchCheckpoint

BATCH = 32


HEAD_IMAGES = 32
"""Images that each head is evaluated on alone: there are many heads."""


class PlanEvaluator:
    """Runs calibration images through a model under one plan after another.

    Args:
        host: An untouched model with a classification head.
        images: [B 3 H W].
        labels: [B], if there are any.
        method: What the plans are for.
        head_keep_rate: Fraction of the heads left.
        processes: Those that share the images; all hold all of them and get the same predictions.

    Raises:
        ValueError: The model has no classification head.
    """

    def __init__(
        self,
        host: Host,
        images: Tensor,
        labels: Tensor | None,
        method: str,
        head_keep_rate: float,
        processes: Processes | None = None,
    ) -> None:
        self.host = host
        self.processes = processes
        self.images = images
        self.labels = labels
        self.method = method_named(method)
        self.head_keep_rate = head_keep_rate
        self.calibration: Calibration = calibrate_host(host, images, head_outputs=head_keep_rate < 1)
        self.dense = self.predict()
        if self.dense.log_probs.shape[1] < 2:
            raise ValueError(
                f"{self.host.name} has no classification head to compare predictions of; give one"
            )

    @torch.inference_mode()
    def predict(self, images: int | None = None) -> Predictions:
        """Run the (first) images through the model as it is."""
        host = self.host
        logits = [
            host.output(host.model(batch.to(host.device, host.dtype))).float().cpu()
            for batch in self._share(self.images[:images].split(BATCH))
        ]
        labels = None if self.labels is None else self.labels[:images]
        return Predictions(torch.cat(gathered(logits, self.processes)).log_softmax(dim=-1), labels)

    def _share(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """Whole batches, so that several processes compute what one would, to the bit."""
        if self.processes is None:
            return batches
        rank, world_size = self.processes.rank, self.processes.world_size
        return batches[len(batches) * rank // world_size : len(batches) * (rank + 1) // world_size]

    def base_plan(self) -> Plan:
        """A plan to be given other counts."""
        return self._plan(self.head_keep_rate)

    def _plan(self, head_keep_rate: float) -> Plan:
        config = PruneConfig(method=self.method.name, head_keep_rate=head_keep_rate)
        return make_plan(self.host, config, self.calibration)

    def plan_by_head_loss(self, checkpoint: SearchCheckpoint) -> Plan:
        """The same, without the heads that are missed least."""
        plan = self._plan(1.0)
        if self.head_keep_rate == 1:
            return plan
        heads = [tuple(range(count)) for count in plan.num_heads]
        whole = dataclasses.replace(
            plan,
            patches_per_block=(plan.num_patches,) * self.host.depth,
            heads=tuple(heads),
            head_correction=True,
        )
        few = dataclasses.replace(self.dense, log_probs=self.dense.log_probs[:HEAD_IMAGES])

        def alone(block: int, head: int) -> list[float]:
            left = tuple(other for other in heads[block] if other != head)
            kept = (*heads[:block], left, *heads[block + 1 :])
            without = dataclasses.replace(whole, heads=tuple(kept))
            return self.distances(without, few)

        losses = {
            (block, head): fmean(
                checkpoint.get_or_compute(
                    f"without head {head} of block {block}", partial(alone, block, head)
                )
            )
            for block, count in enumerate(plan.num_heads)
            if count > 1
            for head in range(count)
        }
        return dataclasses.replace(
            plan, heads=least_missed(losses, self.head_keep_rate), head_correction=True
        )

    def distances(self, plan: Plan, dense: Predictions | None = None) -> list[float]:
        """Distance of every image from the dense model under a plan; ``dense`` may hold the first images only."""
        dense = self.dense if dense is None else dense
        found: list[float] = logit_distances(
            dense, self.predict_under(plan, images=len(dense.log_probs))
        ).tolist()
        return found

    def predict_under(self, plan: Plan, images: int | None = None) -> Predictions:
        """Predictions under a plan, on the first of the images or all."""
        if plan.heads is not None:
            prune_host(self.host, plan, calibration=self.calibration, verify=False)
            try:
                return self.predict(images)
            finally:
                unprune_host(self.host)
        steps = make_steps(self.method, plan.patches_per_block, plan.num_patches)
        install(self.host, Cascade(self.host, self.method, steps))
        try:
            return self.predict(images)
        finally:
            uninstall(self.host)
