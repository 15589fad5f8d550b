"""Prune a model in place, look into it, and undo it. The two names most users need are here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from cpvit.adapters import Host, open_host
from cpvit.attention import ScoredAttention
from cpvit.kernels import KernelName, kernel_named
from cpvit.machine.align import resolve_align
from cpvit.methods import method_named
from cpvit.plans.calibration import Calibration
from cpvit.plans.check import check_plan
from cpvit.plans.config import PruneConfig
from cpvit.plans.heads import HeadOutputs
from cpvit.plans.plan import Plan
from cpvit.plans.resolve import make_plan
from cpvit.plans.steps import make_steps
from cpvit.pruning.calibrate import calibrate_host
from cpvit.pruning.cascade import Cascade
from cpvit.pruning.heads import SlicedHeads
from cpvit.pruning.install import CascadeContainer, install, installed
from cpvit.pruning.opening import open_as_it_is, open_restored, unprune_host
from cpvit.pruning.verify import check


def prune_(
    model: nn.Module,
    config: PruneConfig | Plan | None = None,
    *,
    calibration: Tensor | Iterable[Tensor] | Calibration | None = None,
    dense_features: bool = False,
    checkpointing: bool = False,
    verify: bool = True,
    attention_kernel: KernelName = "eager",
) -> Plan:
    """Make a model prune its patches and heads while it runs; ``model(images)`` keeps working.

    A model that is pruned already is restored first, so the ratio can be changed on a live model. Threads may call a
    pruned model, but not while it is pruned or unpruned: meanwhile a call gives the answer of the state before, after
    or in between (dense), or raises PruningBypassError; where heads are cut it may fail otherwise or give a wrong
    answer, since weights are replaced one after another. Hold a lock, or prune a copy and let it take the model's
    place. ``record`` shows the forwards of all threads.

    Args:
        model: A Vision Transformer of a supported family; changed in place.
        config: What to do: a :class:`PruneConfig`, or a :class:`Plan` made before; default: the paper's method,
            half of the patches left at the end.
        calibration: Unlabelled images [B 3 H W], an iterable of such batches, or what ``calibrate`` returned.
            With it the schedule is layer-aware and heads can be cut.
        dense_features: ``forward_features`` returns every patch in its original place: one that was removed with
            the value it had when it left, one that was merged with that of the token that carries it. Where
            the head pools patches and the method removes them, such a model gives features only.
        checkpointing: Recompute each block in the backward pass to save memory while training.
        verify: First check that, with everything kept, the output equals the untouched model's.
        attention_kernel: What scores column maxima (method "cpvit"): "eager", torch's own operations, or "triton",
            which never stores the attention matrix and is for inference on CUDA.

    Returns:
        The plan that is now active.

    Raises:
        UnsupportedModelError: The model cannot be pruned.
        VerificationError: The check failed; the model is left untouched.
        ValueError: The configuration does not fit the model, or the kernel the device.

    Example:
        >>> model = timm.create_model("deit_small_patch16_224", pretrained=True)
        >>> prune_(model, PruneConfig(macs=0.6))
    """
    return prune_host(
        open_host(model),
        PruneConfig() if config is None else config,
        calibration=calibration,
        dense_features=dense_features,
        checkpointing=checkpointing,
        verify=verify,
        attention_kernel=attention_kernel,
    )


def prune_host(
    host: Host,
    config: PruneConfig | Plan,
    *,
    calibration: Tensor | Iterable[Tensor] | Calibration | None = None,
    dense_features: bool = False,
    checkpointing: bool = False,
    verify: bool = True,
    attention_kernel: KernelName = "eager",
) -> Plan:
    """:func:`prune_` for a model that is opened already."""
    kernel = kernel_named(attention_kernel, host.device)
    before = installed(host)
    unprune_host(host)
    try:
        plan, outputs = _resolve(host, config, calibration, verify=verify, dense_features=dense_features)
        cascade = _cascade(
            host, plan, dense_features=dense_features, checkpointing=checkpointing, kernel=kernel
        )
        _install(host, plan, cascade, _cut_heads(host, plan, outputs))
    except BaseException:
        _reinstate(host, before)
        raise
    return plan


def _resolve(
    host: Host,
    config: PruneConfig | Plan,
    calibration: Tensor | Iterable[Tensor] | Calibration | None,
    *,
    verify: bool,
    dense_features: bool,
) -> tuple[Plan, tuple[HeadOutputs, ...] | None]:
    """The plan to apply, checked against an untouched model, and what its heads are corrected with."""
    if verify:
        check(host)
    statistics = _statistics(host, calibration, head_outputs=corrects_heads(config))
    if isinstance(config, PruneConfig):
        reader = replace(host, discards_patches=host.discards_patches and not dense_features)
        config = make_plan(reader, resolve_align(reader, config, statistics), statistics)
    check_plan(config, host)
    return config, None if statistics is None else statistics.head_outputs


def _statistics(
    host: Host, calibration: Tensor | Iterable[Tensor] | Calibration | None, *, head_outputs: bool
) -> Calibration | None:
    """What is known from calibration images; measured unless it is given."""
    if calibration is None or isinstance(calibration, Calibration):
        return calibration
    return calibrate_host(host, calibration, head_outputs=head_outputs)


def corrects_heads(config: PruneConfig | Plan) -> bool:
    """Whether cut heads will be made up for, which needs their outputs on calibration images."""
    if isinstance(config, Plan):
        return config.head_correction
    return config.head_correction and config.head_keep_rate < 1 and config.head_mode == "slice"


def _reinstate(host: Host, before: CascadeContainer | None) -> None:
    """Put the pruning back that was active before a new one turned out not to fit."""
    if before is None or before.plan is None:
        return
    for cut in before.cut_heads:
        cut.redo()
    _install(host, before.plan, replace(before.cascade, host=host), before.cut_heads)


def unprune_(model: nn.Module) -> None:
    """Restore the untouched model, bit for bit; nothing happens if it is not pruned.

    As with :func:`prune_`, no other thread should call the model meanwhile.

    Raises:
        ValueError: The model was loaded with heads cut: what they were is not in the file.
    """
    open_restored(model)


def plan_of(model: nn.Module) -> Plan | None:
    """The active plan; None if the model is not pruned."""
    _, container = open_as_it_is(model)
    return None if container is None else container.plan


def _cascade(
    host: Host, plan: Plan, *, dense_features: bool, checkpointing: bool, kernel: ScoredAttention | None
) -> Cascade:
    method = method_named(plan.method)
    if kernel is not None and method.evidence != "max":
        raise ValueError(
            f"method {method.name!r} is not scored by column maxima, which is all that attention_kernel is for; "
            "leave attention_kernel='eager'"
        )
    steps = make_steps(method, plan.patches_per_block, plan.num_patches, plan.mask_heads)
    cascade = Cascade(
        host, method, steps, dense_features=dense_features, checkpointing=checkpointing, kernel=kernel
    )
    if host.grid_reader and not dense_features:
        raise ValueError(
            f"{host.name} needs every patch in its place ({host.grid_reader}); give dense_features=True"
        )
    if cascade.pools_departed and not host.head:
        raise ValueError(
            f"{host.name} pools its patches before it answers; with dense_features=True it would pool those that "
            "have left with the others: prune the model below its head (Dinov2Model, SiglipVisionModel with "
            "vision_use_head=False), or use a method that merges"
        )
    return cascade


def _install(host: Host, plan: Plan, cascade: Cascade, cut: tuple[SlicedHeads, ...]) -> None:
    container = install(host, cascade)
    container.plan = plan
    container.cut_heads = cut


def _cut_heads(host: Host, plan: Plan, outputs: tuple[HeadOutputs, ...] | None) -> tuple[SlicedHeads, ...]:
    if plan.heads is None:
        return ()
    if plan.head_correction and outputs is None:
        raise ValueError(
            f"the plan for {plan.model} corrects the projections of the blocks that lose heads, which needs "
            "calibration images: give calibration=... (--calibration; unlabelled, the ones it was made on serve "
            "best), or prune with head_correction=False"
        )
    corrections: Sequence[HeadOutputs | None] = (None,) * host.depth
    if plan.head_correction and outputs is not None:
        corrections = outputs
    return tuple(
        SlicedHeads(block, keep, correction)
        for block, keep, correction in zip(host.blocks, plan.heads, corrections, strict=True)
        if len(keep) < block.num_heads
    )
