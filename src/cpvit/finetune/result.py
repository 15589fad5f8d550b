"""The result of a finetuning run, and its record."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from cpvit.finetune.checkpoint import Evaluation
from cpvit.finetune.config import FinetuneConfig
from cpvit.machine.environment import Environment
from cpvit.plans.plan import Plan


@dataclass(frozen=True)
class FinetuneResult:
    """One run of :func:`finetune`."""

    model: str
    plan: Plan | None
    """None for a dense run."""
    config: FinetuneConfig
    facts: dict[str, Any]
    """The run fingerprint (:mod:`cpvit.finetune.fingerprint`)."""
    final: Evaluation | None
    """None only in the record of a run that is not evaluated yet."""
    best: Evaluation | None
    evaluations: tuple[Evaluation, ...]
    history: dict[str, list[float | None]]
    """Per step: loss, accuracy, grad_norm, learning_rate, images_per_s. None is an infinite gradient, which float16
    meets now and then: that step was left out."""
    images_per_s: float
    """Median over the steps; all processes together, training alone."""
    seconds: float
    """Spent in training steps, over all parts of an interrupted run."""
    steps_done: int
    resumed_at: int
    """Steps that were done already when this process began."""
    trained_values: int
    """Number of weights that were trained."""
    environment: Environment


def record_text(result: FinetuneResult) -> str:
    """The record as JSON."""
    return json.dumps(dataclasses.asdict(result), indent=2, default=str) + "\n"


def best_of(evaluations: tuple[Evaluation, ...]) -> Evaluation | None:
    """The first of the highest top-1."""
    return max(evaluations, key=lambda evaluation: evaluation.top1, default=None)
