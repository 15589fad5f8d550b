"""Open models of Hugging Face transformers by their structure: ViT, DINOv2, DINOv3, CLIP, SigLIP, BEiT and many more.

The tower is found by ``hf_tower``, the parts of its layers by ``hf_parts``; the block is in ``hf_layer``, and what
structure does not say is in ``hf_families``. transformers itself is never imported here: a model that comes from it
has imported it.

The grid is the one of ``config.image_size``. transformers' own gradient checkpointing and the recording of attention
(``output_attentions``) happen in layers that a pruned model does not call; they are refused rather than ignored.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cpvit.adapters.hf_families import (
    ANY_SIZE,
    AVERAGES_IF_TOLD,
    IN_TUPLES,
    READS_CLASS_TOKEN,
    REFUSED,
    SET_IMAGE_SIZE,
    TITLES,
)
from cpvit.adapters.hf_layer import TransformersBlock, rotary_function
from cpvit.adapters.hf_parts import layer_parts, part
from cpvit.adapters.hf_tower import Tower, find_tower
from cpvit.adapters.host import Host, UnsupportedModelError
from cpvit.adapters.refusals import GENERAL, refusal
from cpvit.core import HostArguments

OLDEST, NEWEST_MAJOR = (5, 18), 5
"""First version whose layers have these names in every family, and the major version they are known for."""

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")
"""The others pass masks of their own format to the layers, and cannot run on the meta device (MAC counting)."""


def open_hf(model: nn.Module) -> Host | None:
    """Open a model of transformers; None if it is not one.

    Raises:
        UnsupportedModelError: It is one, but of a version, class or setting the cascade does not know.
    """
    names = _transformers_classes(model)
    if not names:
        return None
    check_version(sys.modules["transformers"].__version__)
    try:
        _refuse_by_name(model, names)
        return _open(model, find_tower(model), names)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be pruned: {error}") from None


def _transformers_classes(model: nn.Module) -> list[str]:
    """The model's class, or the nearest that transformers defines; further bases follow."""
    return [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]


def check_version(version: str) -> None:
    """Raise UnsupportedModelError for a version whose layers have other names."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) >= OLDEST and major == NEWEST_MAJOR:
        return
    oldest = ".".join(map(str, OLDEST))
    raise UnsupportedModelError(
        f"transformers {version} is installed, and cpvit knows the layers of {oldest} to {NEWEST_MAJOR}.x "
        f"(their names moved before); pip install 'transformers>={oldest},<{NEWEST_MAJOR + 1}'"
    )


def _refuse_by_name(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        if name in REFUSED:
            raise UnsupportedModelError(REFUSED[name])
    reason = refusal(model)
    if reason != GENERAL:
        raise UnsupportedModelError(reason)


def _open(model: Any, tower: Tower, names: Sequence[str]) -> Host:
    module = tower.module
    config = module.config
    _check_config(config)
    check_attention(model, config)
    channels, size, grid = _image(config)
    layers = list(getattr(tower.parent, tower.layers_at[-1]).children())
    pools = tower.pool is not None or _averages(names[0], config, model)
    return Host(
        family=f"transformers {TITLES.get(config.model_type, config.model_type)}",
        model=model,
        parent=tower.parent,
        attribute=tower.layers_at[-1],
        blocks=tuple(_block(layer, tower) for layer in layers),
        num_prefix=tower.num_prefix,
        grid=grid,
        image_shape=(*_frames(config), channels, *size),
        pools_patches=pools,
        discards_patches=not pools and hasattr(model, "classifier"),
        pool_token_macs=pool_token_macs(tower.pool),
        positional=_positional(layers[0]),
        output=tensor_of,
        blocked=why_blocked,
        num_classes=model.config.num_labels if hasattr(model, "classifier") else 0,
        architecture=_architecture(model, config, len(layers)),
        reads_values=_makes_mask(module),
        grid_reader=_grid_reader(model),
        in_tuple=type(layers[0]).__name__ in IN_TUPLES,
        resizing=SET_IMAGE_SIZE if config.model_type in ANY_SIZE else "",
    )


def _makes_mask(tower: nn.Module) -> bool:
    """Whether the tower makes a mask over patches that are padding, if only to find that none is."""
    return "patch_attention_mask" in inspect.signature(type(tower).forward).parameters


def _grid_reader(model: nn.Module) -> str:
    """What reads every patch in its place, of the model or of the one it is the backbone of."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return "it returns the patches of its stages as maps" if "BackboneMixin" in names else ""


def _block(layer: nn.Module, tower: Tower) -> TransformersBlock:
    parts = layer_parts(layer)
    if "position_embeddings" in inspect.signature(type(part(layer, parts.attention)).forward).parameters:
        rotary_function(part(layer, parts.attention))
    return TransformersBlock(
        layer,
        parts,
        num_prefix=tower.num_prefix,
        shared_bias=_shared_name(layer) if tower.shared_bias else "",
        padded=_makes_mask(tower.module),
    )


def _shared_name(layer: nn.Module) -> str:
    """Under which name the tower hands the shared bias to its layers."""
    name = "relative_position_bias"
    return name if name in inspect.signature(type(layer).forward).parameters else "attention_mask"


def _positional(layer: nn.Module) -> tuple[str, ...]:
    """Names of the layer's arguments after the tokens."""
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def _averages(name: str, config: Any, model: Any) -> bool:
    """Whether the patches are averaged; of a classifier that is not known it is supposed."""
    if name in READS_CLASS_TOKEN:
        return False
    told = bool(getattr(config, "use_mean_pooling", False))
    if name in AVERAGES_IF_TOLD or not hasattr(model, "classifier"):
        return told and (hasattr(model, "classifier") or getattr(model, "pooler", None) is not None)
    return True


def check_attention(model: nn.Module, config: Any) -> None:
    """Raise UnsupportedModelError for an implementation with masks of its own."""
    implementation = config._attn_implementation
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"it uses attn_implementation={implementation!r}; call "
            'model.set_attn_implementation("sdpa") first (a pruned model runs fused attention in any case)'
        )


def _check_config(config: Any) -> None:
    """Raise UnsupportedModelError if patches are dropped by chance or kept apart in windows."""
    if getattr(config, "num_windows", 1) > 1:
        raise UnsupportedModelError("it attends inside windows of the full patch grid (config.num_windows)")
    if getattr(config, "mask_ratio", 0):
        raise UnsupportedModelError(
            f"its embeddings drop {config.mask_ratio:.0%} of the patches by chance (and shuffle the rest); set "
            "model.config.mask_ratio = 0 first, or load the weights as ViTModel, which reads them in order"
        )


def _image(config: Any) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Channels, height and width, patch rows and columns; of a video the rows of all its frames."""
    patch_size, tubelet = getattr(config, "patch_size", None), getattr(config, "tubelet_size", None)
    if patch_size is None and isinstance(tubelet, Sequence):
        patch_size = tubelet[1:]
    if getattr(config, "image_size", None) is None or patch_size is None:
        raise UnsupportedModelError(
            "its configuration has no image_size and patch_size, so its grid is not known"
        )
    height, width = _pair(config.image_size)
    patch_height, patch_width = _pair(patch_size)
    deep = 1
    if tubelet is not None:
        deep = config.num_frames // (tubelet if isinstance(tubelet, int) else tubelet[0])
    return (
        getattr(config, "num_channels", 3),
        (height, width),
        (deep * (height // patch_height), width // patch_width),
    )


def _frames(config: Any) -> tuple[int, ...]:
    """The frames of a video, which come before its channels; () for an image."""
    return (int(config.num_frames),) if getattr(config, "tubelet_size", None) is not None else ()


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    if isinstance(size, int):
        return size, size
    return int(size[0]), int(size[1])


def _architecture(model: nn.Module, config: Any, depth: int) -> str:
    """Class and size: unlike the checkpoint's name, the same wherever the model was loaded from."""
    size = getattr(config, "patch_size", None)
    sides = _pair(config.tubelet_size[1:] if size is None else size)
    patch = "x".join(str(side) for side in dict.fromkeys(sides))
    return f"{type(model).__name__}-{depth}x{config.hidden_size}-patch{patch}"


def pool_token_macs(pool: Any) -> int:
    """MACs of an attention pooling with one query, per token it reads: key, value, and their attention.

    Raises:
        UnsupportedModelError: A pooling that is not known.
    """
    if pool is None:
        return 0
    attention = getattr(pool, "attention", None)
    if isinstance(attention, nn.MultiheadAttention):
        width = int(attention.embed_dim)
    elif hasattr(pool, "k_proj") and hasattr(pool, "v_proj"):
        width = int(pool.k_proj.out_features)
    else:
        raise UnsupportedModelError(f"its head ({type(pool).__name__}) pools in a way that is not known")
    return 2 * width * width + 2 * width


def tensor_of(result: Any) -> Tensor:
    """Logits, else the projected or pooled image, else the tokens, from what the model returns."""
    if isinstance(result, tuple):  # return_dict=False: the same order, without names
        first: Tensor = result[0]
        return first
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state", "feature_maps"):
        value: Any = getattr(result, name, None)
        if value is not None:
            found: Tensor = value[-1] if isinstance(value, tuple) else value
            return found
    raise TypeError(f"{type(result).__name__} holds no image features that cpvit knows")


def why_blocked(host: Host, extra: HostArguments) -> str | None:
    """What transformers would do around its layers, which a pruned model does not call."""
    layers = [block.module for block in host.blocks]
    checkpoints = (layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers)
    if torch.is_grad_enabled() and any(checkpoints):
        return (
            "transformers' own gradient checkpointing has no effect on a pruned model; switch it off "
            "(model.gradient_checkpointing_disable()) and use prune_(..., checkpointing=True)"
        )
    config = getattr(host.parent, "config", host.model.config)
    if extra.get("output_attentions", getattr(config, "output_attentions", False)):
        return (
            "output_attentions is recorded by hooks in the layers, which a pruned model does not call: it would "
            "come back empty; use record(model) for what the pruning did, or call unprune_(model) first"
        )
    return None
