"""Prune the image tower of a vision-language model, and give its text model fewer image tokens, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cpvit.adapters import Host, open_host
from cpvit.multimodal.layouts import Eyes, take_apart
from cpvit.multimodal.processors import Setting, model_settings, processor_settings
from cpvit.multimodal.tokens import AfterConnector, BeforeConnector, Choice, PackedCrops, see_positions
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig
from cpvit.plans.plan import Plan
from cpvit.pruning.cascade import BlockHook
from cpvit.pruning.install import installed
from cpvit.pruning.opening import open_restored
from cpvit.pruning.prune import prune_host

_STORED = "_cpvit_vlm"
"""Attribute of the model under which its pruning is kept."""


@dataclass(frozen=True)
class VlmPruning:
    """What :func:`prune_vlm_` did."""

    plan: Plan
    """Of the image tower."""
    image_tokens: int
    """Tokens that the text model gets of one image, or of one crop where the processor cuts it into crops."""
    dense_image_tokens: int
    """How many it got of the untouched model."""
    settings: tuple[Setting, ...] = ()
    """What was set in model and processor."""


def prune_vlm_(
    model: nn.Module,
    config: PruneConfig | Plan | None = None,
    *,
    processor: Any = None,
    calibration: Tensor | Iterable[Tensor] | Calibration | None = None,
    checkpointing: bool = False,
    verify: bool = True,
) -> VlmPruning:
    """Prune the image tower of a vision-language model in place; ``model(...)`` and ``generate`` keep working.

    Patches leave the tower as :func:`~cpvit.prune_` plans it, and the text model gets those that are left after the
    block whose tokens it reads, in the order of the grid. Where the connector joins neighbours (Idefics3, SmolVLM,
    InternVL) it runs on the full grid, and the same share of its tokens is kept: those most of whose patches are left.
    LLaVA-NeXT keeps the same share of the whole image and its crops together, and every end of a row.

    A model that is pruned already is restored first.

    Args:
        model: LLaVA, LLaVA-NeXT, PaliGemma, Idefics3, SmolVLM or InternVL of Hugging Face transformers.
        config: What to do in the tower; budgets are fractions of the tower's cost. Default: the paper's method, half
            of the patches left at the end.
        processor: The model's; it then writes as many image tokens into a prompt as the model makes. Without it the
            prompt must hold ``image_tokens`` of them per image.
        calibration: Unlabelled images for the tower [B 3 H W], as for ``prune_``.
        checkpointing: As for ``prune_``.
        verify: First check that the tower, with everything kept, gives what the untouched one gives.

    Raises:
        UnsupportedModelError: The model, or its tower, cannot be pruned; the message names the part.
        VerificationError: The check failed; the model is left untouched.
        ValueError: The configuration does not fit the tower, or the processor not the model.

    Example:
        >>> pruned = prune_vlm_(model, PruneConfig(macs=0.6), processor=processor)  # doctest: +SKIP
        >>> model.generate(**processor(images=image, text=prompt, return_tensors="pt"))  # doctest: +SKIP
    """
    unprune_vlm_(model)
    eyes = take_apart(model)
    host = open_host(eyes.tower)
    eyes.handed_prefix(host)
    plan = prune_host(
        host,
        PruneConfig() if config is None else config,
        calibration=calibration,
        dense_features=True,
        checkpointing=checkpointing,
        verify=verify,
    )
    try:
        choice = _choice(eyes, host, plan)
        settings = processor_settings(eyes, host, choice, processor)
    except BaseException:
        open_restored(eyes.tower)
        raise
    prefix = eyes.handed_prefix(host)
    settings += model_settings(eyes, choice.tokens + prefix)
    _install(eyes, host, choice)
    for setting in settings:
        setting.apply()
    pruning = VlmPruning(plan, choice.tokens + prefix, choice.groups + prefix, tuple(settings))
    vars(eyes.model)[_STORED] = pruning
    return pruning


def unprune_vlm_(model: nn.Module) -> None:
    """Restore the untouched model, and the processor that was given to :func:`prune_vlm_`, bit for bit.

    Nothing happens if the model is not pruned.

    Raises:
        UnsupportedModelError: The model is none that :func:`prune_vlm_` prunes.
    """
    eyes = take_apart(model)
    pruning = vars(eyes.model).pop(_STORED, None)
    if pruning is None:
        return
    for setting in reversed(pruning.settings):
        setting.restore()
    vars(eyes.model).pop(PackedCrops.name, None)
    connector = eyes.connector
    for hooks in (connector._forward_pre_hooks, connector._forward_hooks):
        for key in [
            key for key, hook in hooks.items() if isinstance(hook, (BeforeConnector, AfterConnector))
        ]:
            del hooks[key]
    open_restored(eyes.tower)


def pruning_of(model: nn.Module) -> VlmPruning | None:
    """What :func:`prune_vlm_` did to a vision-language model; None if it is not pruned."""
    found: VlmPruning | None = vars(take_apart(model).model).get(_STORED)
    return found


def _choice(eyes: Eyes, host: Host, plan: Plan) -> Choice:
    """Which tokens the text model gets.

    Raises:
        ValueError: The connector cannot join the patches of this grid.
    """
    block, factor = eyes.feature_block(host.depth), eyes.factor
    if any(side % factor for side in host.grid):
        raise ValueError(
            f"{type(eyes.model).__name__} joins {factor} x {factor} patches, which a grid of {host.grid[0]} x "
            f"{host.grid[1]} cannot be divided into"
        )
    return Choice(block, plan.patches_per_block[block], host.grid, factor)


def _install(eyes: Eyes, host: Host, choice: Choice) -> None:
    container = installed(host)
    assert container is not None, "prune_host has just installed it"
    container.cascade.hooks.append(BlockHook(see_positions))
    if eyes.layout.chosen == "packed":
        vars(eyes.model)[PackedCrops.name] = PackedCrops(eyes.model, choice)
    elif eyes.layout.chosen == "after":
        eyes.connector.register_forward_hook(AfterConnector(choice))
    else:
        eyes.connector.register_forward_pre_hook(BeforeConnector(choice))
