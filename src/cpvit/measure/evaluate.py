"""How good is the pruned model, next to the dense one, on the same images in the same run?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from cpvit.adapters import Host
from cpvit.data import Batches
from cpvit.machine.environment import Environment, describe_environment
from cpvit.machine.processes import Processes, gathered
from cpvit.measure.examples import (
    Disagreement,
    ExampleOptions,
    Examples,
    Gallery,
    PatchTrace,
    disagreements,
)
from cpvit.measure.metrics import Predictions, agreement, kl_divergence
from cpvit.measure.outcomes import Outcomes, outcomes, right
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig
from cpvit.plans.escalation import Escalation
from cpvit.plans.macs import host_macs
from cpvit.plans.plan import Plan
from cpvit.pruning.escalation import escalate_host, mean_macs
from cpvit.pruning.opening import open_pruned, open_restored, unprune_host
from cpvit.pruning.prune import prune_host

T = TypeVar("T")


class Progress(Protocol):
    """Wraps an iterable of a known length to show its progress under a title."""

    def __call__(self, items: Iterable[T], title: str, total: int) -> Iterable[T]:
        """The same items."""
        ...


def no_progress(items: Iterable[T], title: str, total: int) -> Iterable[T]:
    """Show nothing."""
    return items


@dataclass(frozen=True)
class DenseResult:
    """The untouched model."""

    top1: float
    """Percent."""
    top5: float
    """Percent."""
    macs: int
    """Multiply-accumulates of one image, counted by torch."""
    params: int


@dataclass(frozen=True)
class PrunedResult(DenseResult):
    """The pruned model."""

    tokens_per_block: tuple[int, ...]
    """Tokens that leave each block, prefix tokens included."""
    heads_per_block: tuple[int, ...]
    """Heads that work in each block."""


@dataclass(frozen=True)
class EscalationResult:
    """Two stages on the evaluated images; their mean MACs are those of ``PrunedResult``."""

    margin: float
    share: float
    """Of the images that ran again."""
    second: Plan | None
    """None is the dense model."""


@dataclass(frozen=True)
class EvalResult:
    """One run of :func:`evaluate`."""

    model: str
    dense: DenseResult
    pruned: PrunedResult
    macs_ratio: float
    agreement: float
    """Share of the images on which the pruned model predicts what the dense one does."""
    kl: float
    """Mean KL divergence of the pruned from the dense class distribution, in nats."""
    images: int
    images_skipped: int
    skipped: tuple[str, ...]
    """Names of the images that could not be read."""
    plan: Plan
    environment: Environment
    dense_right: str
    """A character for each image: 1 where the dense model is right."""
    outcomes: Outcomes
    """Of each image under the pruned model."""
    escalation: EscalationResult | None = None
    """How many images ran again, where two plans were applied; ``plan`` is then that of the first stage."""
    disagreements: tuple[Disagreement, ...] = ()
    """Images that are classified otherwise than by the dense model; at most 50."""
    traces: tuple[PatchTrace, ...] = ()
    """What became of the patches of the images of the gallery; empty for two stages."""
    examples: Examples | None = None
    """Pictures, if they were asked for."""


def evaluate(
    model: nn.Module,
    batches: Batches,
    config: PruneConfig | Plan | Escalation | None = None,
    *,
    calibration: Calibration | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    processes: Processes | None = None,
    examples: ExampleOptions | None = None,
) -> EvalResult:
    """Evaluate a model dense and pruned on the same images. The model is left untouched.

    Args:
        model: An untouched model on its device and in its dtype.
        batches: Labelled images.
        config: What to prune, or two plans to escalate between; default: the paper's method, half of the patches left.
        calibration: From ``calibrate``; makes the schedule layer-aware and lets heads be cut.
        seed: Only recorded.
        progress: Shows how far each pass is.
        processes: Those that share the work, each with batches of its own share; the result is that of all images.
        examples: What to show of single images, and the names of the classes.

    Raises:
        ValueError: The configuration does not fit the model, or the images have no labels.
    """
    return evaluate_host(
        open_restored(model),
        batches,
        config,
        calibration=calibration,
        seed=seed,
        progress=progress,
        processes=processes,
        examples=examples,
    )


def evaluate_host(
    host: Host,
    batches: Batches,
    config: PruneConfig | Plan | Escalation | None = None,
    *,
    calibration: Calibration | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    processes: Processes | None = None,
    examples: ExampleOptions | None = None,
) -> EvalResult:
    """:func:`evaluate` for a model that is opened already, and is not pruned."""
    run = partial(predict, batches=batches, progress=progress, processes=processes)
    dense = run(host, title="dense")
    dense_result = DenseResult(dense.top(1), dense.top(5), host_macs(host), count_params(host.model))
    shown = Gallery(host, dense, batches, examples, processes)
    if isinstance(config, Escalation):
        found = _two_stages(host, config, run, processes)
    else:
        found = _one_plan(host, PruneConfig() if config is None else config, calibration, run, shown)
    pruned, plan = found.predictions, found.plan
    differ = disagreements(dense, pruned, examples)
    skipped = gathered(list(batches.skipped), processes)
    return EvalResult(
        model=plan.model,
        dense=dense_result,
        pruned=_pruned_result(pruned, plan, found.macs, found.params),
        macs_ratio=found.macs / dense_result.macs,
        agreement=agreement(dense, pruned),
        kl=kl_divergence(dense, pruned),
        images=len(dense.log_probs),
        images_skipped=len(skipped),
        skipped=tuple(skipped),
        plan=plan,
        environment=describe_environment(host.device, host.dtype, seed),
        dense_right=right(dense),
        outcomes=outcomes(dense, pruned),
        escalation=found.escalation,
        disagreements=differ,
        traces=found.traces,
        examples=shown.examples([differ]),
    )


@dataclass(frozen=True)
class SavedEvalResult:
    """One run of :func:`evaluate_pruned`."""

    model: str
    pruned: PrunedResult
    images: int
    images_skipped: int
    skipped: tuple[str, ...]
    """Names of the images that could not be read."""
    plan: Plan
    environment: Environment


def evaluate_pruned(
    model: nn.Module,
    batches: Batches,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
    processes: Processes | None = None,
) -> SavedEvalResult:
    """Evaluate a pruned model as it is, whose dense weights may be lost (``load_pruned`` of a model with cut heads).

    Args:
        model: A pruned model.
        batches: Labelled images.
        seed: Only recorded.
        progress: Shows how far it is.
        processes: Those that share the work, as in :func:`evaluate`.

    Raises:
        ValueError: The model is not pruned, or the images have no labels.
    """
    host, container = open_pruned(model)
    plan = container.plan
    assert plan is not None, "prune_ leaves a plan with the cascade"
    predictions = predict(host, batches, title="pruned", progress=progress, processes=processes)
    skipped = gathered(list(batches.skipped), processes)
    return SavedEvalResult(
        model=plan.model,
        pruned=_pruned_result(predictions, plan, host_macs(host), count_params(model)),
        images=len(predictions.log_probs),
        images_skipped=len(skipped),
        skipped=tuple(skipped),
        plan=plan,
        environment=describe_environment(host.device, host.dtype, seed),
    )


def _pruned_result(predictions: Predictions, plan: Plan, macs: int, params: int) -> PrunedResult:
    return PrunedResult(
        top1=predictions.top(1),
        top5=predictions.top(5),
        macs=macs,
        params=params,
        tokens_per_block=plan.tokens_per_block,
        heads_per_block=plan.heads_per_block,
    )


class _Pruned(NamedTuple):
    """What the pruned side of an evaluation gave."""

    predictions: Predictions
    plan: Plan
    macs: int
    params: int
    escalation: EscalationResult | None = None
    traces: tuple[PatchTrace, ...] = ()


def _one_plan(
    host: Host,
    config: PruneConfig | Plan,
    calibration: Calibration | None,
    run: Callable[..., Predictions],
    shown: Gallery,
) -> _Pruned:
    plan = prune_host(host, config, calibration=calibration)
    try:
        predictions = run(host, title="pruned")
        return _Pruned(
            predictions, plan, host_macs(host), count_params(host.model), traces=shown.traces(host)
        )
    finally:
        unprune_host(host)


def _two_stages(
    host: Host, config: Escalation, run: Callable[..., Predictions], processes: Processes | None
) -> _Pruned:
    """MACs are the mean of what the images really cost."""
    model = escalate_host(host, config)
    again: list[int] = []
    model.second_model.register_forward_pre_hook(lambda _, args: again.append(len(args[0])))
    predictions = run(model.host, title="two stages")
    share = sum(gathered(again, processes)) / len(predictions.log_probs)
    macs = round(mean_macs(host, config, share) * host_macs(host))
    result = EscalationResult(config.margin, share, config.second)
    return _Pruned(predictions, config.light, macs, count_params(host.model), result)


@torch.no_grad()  # not in inference mode: a host may keep what it computes now (BEiT's indices) for training
def predict(
    host: Host,
    batches: Batches,
    *,
    title: str = "",
    progress: Progress = no_progress,
    processes: Processes | None = None,
) -> Predictions:
    """Run a model over labelled images; of several processes each runs its share, and all get the predictions of all.

    Raises:
        ValueError: The images have no labels.
    """
    log_probs, labels, keys = [], [], []
    with host.in_eval_mode():
        for batch in progress(batches, title, len(batches)):
            if batch.labels is None:
                raise ValueError(
                    "evaluation needs labels; build the loader with labels=label_map(source, num_classes)"
                )
            logits = host.output(
                host.model(batch.images.to(host.device, host.dtype, non_blocking=batch.images.is_pinned()))
            )
            log_probs.append(logits.float().log_softmax(dim=-1).cpu())
            labels.append(batch.labels)
            keys.append(batch.keys)
    shares = gathered(list(zip(log_probs, labels, keys, strict=True)), processes)
    return Predictions(
        torch.cat([share[0] for share in shares]),
        torch.cat([share[1] for share in shares]),
        tuple(key for share in shares for key in share[2]),
    )


def count_params(model: nn.Module) -> int:
    """Parameters the model holds now."""
    return sum(parameter.numel() for parameter in model.parameters())
