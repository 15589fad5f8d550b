"""Prune a model in place, look into it, and undo it. The two names most users need are here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from cpvit.adapters import Host, open_host
from cpvit.attention import ScoredAttention
from cpvit.calibrate import Calibration, calibrate
from cpvit.cascade import (
    Cascade,
    CascadeContainer,
    Watched,
    Watcher,
    install,
    installed,
    make_steps,
    uninstall,
    watching,
)
from cpvit.heads import HeadOutputs, SlicedHeads
from cpvit.kernels import KernelName, kernel_named
from cpvit.methods import method_named
from cpvit.plan import Plan, PruneConfig
from cpvit.planning import make_plan
from cpvit.verify import check


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

    A model that is pruned already is restored first, so the ratio can be changed on a live model.

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
        The plan that is now in force.

    Raises:
        UnsupportedModelError: The model cannot be pruned.
        VerificationError: The check failed; the model is left untouched.
        ValueError: The configuration does not fit the model, or the kernel the device.

    Example:
        >>> model = timm.create_model("deit_small_patch16_224", pretrained=True)
        >>> prune_(model, PruneConfig(macs=0.6))
    """
    host = open_host(model)
    kernel = kernel_named(attention_kernel, next(model.parameters()).device)
    before = installed(host)
    unprune_(model)
    try:
        plan, outputs = _resolve(
            model, host, PruneConfig() if config is None else config, calibration, verify=verify
        )
        cascade = _cascade(
            host, plan, dense_features=dense_features, checkpointing=checkpointing, kernel=kernel
        )
        _install(host, plan, cascade, _cut_heads(host, plan, outputs))
    except BaseException:
        _reinstate(host, before)
        raise
    return plan


def _resolve(
    model: nn.Module,
    host: Host,
    config: PruneConfig | Plan,
    calibration: Tensor | Iterable[Tensor] | Calibration | None,
    *,
    verify: bool,
) -> tuple[Plan, tuple[HeadOutputs, ...] | None]:
    """The plan to apply, checked against an untouched model, and what its heads are corrected with."""
    if verify:
        check(model)
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = calibrate(model, calibration, head_outputs=corrects_heads(config))
    plan = config if isinstance(config, Plan) else make_plan(host, config, calibration)
    check_plan(plan, host)
    return plan, None if calibration is None else calibration.head_outputs


def corrects_heads(config: PruneConfig | Plan) -> bool:
    """Whether cut heads will be made up for, which needs their outputs on calibration images."""
    if isinstance(config, Plan):
        return config.head_correction
    return config.head_correction and config.head_keep_rate < 1 and config.head_mode == "slice"


def _reinstate(host: Host, before: CascadeContainer | None) -> None:
    """Put the pruning back that was in force before a new one turned out not to fit."""
    if before is None or before.plan is None:
        return
    for cut in before.cut_heads:
        cut.redo()
    _install(host, before.plan, replace(before.cascade, host=host), before.cut_heads)


def unprune_(model: nn.Module) -> None:
    """Restore the untouched model, bit for bit; nothing happens if it is not pruned.

    Raises:
        ValueError: The model was loaded with heads cut: what they were is not in the file.
    """
    host = open_host(model)
    container = installed(host)
    if container is None:
        return
    if container.heads_lost:
        raise ValueError(
            f"{host.name} was saved with heads cut, so their weights are lost and it cannot be unpruned or pruned "
            "anew; start from the weights it was pruned from"
        )
    uninstall(host)
    for cut in container.cut_heads:
        cut.restore()


def plan_of(model: nn.Module) -> Plan | None:
    """The plan in force; None if the model is not pruned."""
    container = installed(open_host(model))
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


def check_plan(plan: Plan, host: Host) -> None:
    """Raise ValueError unless the plan was made for a model like this one."""
    _expect(plan, "blocks", len(plan.patches_per_block), host.depth, host)
    _expect(plan, "patches", plan.num_patches, host.num_patches, host)
    _expect(plan, "prefix tokens", plan.num_prefix, host.num_prefix, host)
    _expect(plan, "heads per block", plan.num_heads, tuple(block.num_heads for block in host.blocks), host)
    if plan.model != host.name:
        raise ValueError(
            f"the plan was made for {plan.model} and the model is {host.name}; make a plan for it"
        )
    for what, entries in (("lists of heads", plan.heads), ("mask_heads", plan.mask_heads)):
        if entries is not None:
            _expect(plan, what, len(entries), host.depth, host)
    _check_counts(plan)


def _expect(plan: Plan, what: str, planned: object, got: object, host: Host) -> None:
    if planned != got:
        raise ValueError(
            f"the plan (for {plan.model}) has {planned} {what} and {host.name} has {got}; make a new plan"
        )


def _check_counts(plan: Plan) -> None:
    counts = (plan.num_patches, *plan.patches_per_block)
    if min(counts) < 1 or any(later > earlier for earlier, later in itertools.pairwise(counts)):
        raise ValueError(
            f"patches_per_block must never rise, from {counts[0]} down to at least 1, got {counts[1:]}"
        )
    for block, count in enumerate(plan.mask_heads or ()):
        if not 1 <= count <= plan.num_heads[block]:
            raise ValueError(
                f"mask_heads of block {block} must be within 1..{plan.num_heads[block]}, got {count}"
            )
    for block, kept in enumerate(plan.heads or ()):
        if (
            not kept
            or sorted(set(kept)) != list(kept)
            or not 0 <= kept[0] <= kept[-1] < plan.num_heads[block]
        ):
            raise ValueError(
                f"heads of block {block} must be distinct, rising, within 0..{plan.num_heads[block] - 1}, got {kept}"
            )


@dataclass
class Trace:
    """What the last forward inside :func:`record` did."""

    survivors: tuple[Tensor, ...] = ()
    """Per block [B K]: original positions, row-major over the patch grid, of the patches that leave it."""
    carriers: tuple[Tensor | None, ...] = ()
    """Per block [B N0]: for merging methods, the row of the token that carries each original patch."""
    _seen: list[Watched] = field(default_factory=list, repr=False)

    def _see(self, watched: Watched) -> None:
        seen = [] if watched.block == 0 else self._seen
        self._seen = [*seen, watched._replace(tokens=watched.tokens[:0])]
        self.survivors = tuple(past.state.positions for past in self._seen)
        self.carriers = tuple(past.state.carrier for past in self._seen)


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record which patches survive each block of a pruned model.

    Raises:
        ValueError: The model is not pruned.

    Example:
        >>> with record(model) as trace:
        ...     model(images)
        >>> trace.survivors[-1].shape  # [B K]
    """
    container = _container(model)
    trace = Trace()
    with watching(container.cascade, Watcher(trace._see)):
        yield trace


def _container(model: nn.Module) -> CascadeContainer:
    host = open_host(model)
    container = installed(host)
    if container is None:
        raise ValueError(f"{host.name} is not pruned; call prune_(model) first")
    return container
