"""Open models of Hugging Face transformers: ViT, DeiT, DINOv2, and the image towers of CLIP and SigLIP.

The names of their modules are in ``hf_families``, the block is in ``hf_layer``. transformers itself is never
imported here: a model that comes from it has imported it.

The grid is the one of ``config.image_size``. Two things that transformers does around its layers, which a
pruned model does not call, are refused rather than ignored: recording (``output_hidden_states``,
``output_attentions``) and its own gradient checkpointing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cpvit.adapters.hf_families import MODELS, REFUSED, Entry, LayerNames
from cpvit.adapters.hf_layer import TransformersBlock
from cpvit.adapters.host import Host, UnsupportedModelError
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
    return _open(model, _entry_of(model, names))


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


def _entry_of(model: nn.Module, names: Sequence[str]) -> Entry:
    for name in names:
        if name in REFUSED:
            raise UnsupportedModelError(f"{name} cannot be pruned: {REFUSED[name]}")
        if name in MODELS:
            return MODELS[name]
    raise UnsupportedModelError(
        f"{type(model).__name__} (transformers) is not known to cpvit; give one of {', '.join(MODELS)}. "
        "Of a model that also reads text, give the image tower alone"
    )


def _open(model: nn.Module, entry: Entry) -> Host:
    family = entry.family
    tower: Any = getattr(model, entry.tower) if entry.tower else model
    path, _, attribute = family.layers.rpartition(".")
    parent = tower.get_submodule(path)
    layers = list(getattr(parent, attribute).children())
    check_layers(model, layers, family.names)
    check_attention(model, tower.config)
    height, width = _pair(tower.config.image_size)
    patch_height, patch_width = _pair(tower.config.patch_size)
    pool = getattr(tower, "head", None)
    return Host(
        family=family.title,
        model=model,
        parent=parent,
        attribute=attribute,
        blocks=tuple(TransformersBlock(layer, family.names) for layer in layers),
        num_prefix=family.num_prefix + getattr(tower.config, "num_register_tokens", 0),
        grid=(height // patch_height, width // patch_width),
        image_shape=(tower.config.num_channels, height, width),
        pools_patches=entry.averages or pool is not None,
        discards_patches=not entry.averages and pool is None and hasattr(model, "classifier"),
        pool_token_macs=pool_token_macs(pool),
        positional=("attention_mask",),
        output=tensor_of,
        blocked=why_blocked,
        architecture=_architecture(model, tower.config),
        resizing=family.resizing,
    )


def check_layers(model: nn.Module, layers: Sequence[nn.Module], names: LayerNames) -> None:
    """Raise UnsupportedModelError unless every layer, and its attention, is of the class known exactly."""
    for number, layer in enumerate(layers):
        attention = getattr(layer, names.attention, None)
        got = (type(layer).__name__, type(attention).__name__)
        if got != (names.layer, names.attention_class):
            raise UnsupportedModelError(
                f"layer {number} of {type(model).__name__} is a {got[0]} with {got[1]}, which cannot be "
                f"pruned: only {names.layer} with {names.attention_class} is known exactly"
            )


def check_attention(model: nn.Module, config: Any) -> None:
    """Raise UnsupportedModelError for an implementation with masks of its own."""
    implementation = config._attn_implementation
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{type(model).__name__} uses attn_implementation={implementation!r}; call "
            'model.set_attn_implementation("sdpa") first (a pruned model runs fused attention in any case)'
        )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _architecture(model: nn.Module, config: Any) -> str:
    """Class and size: unlike the checkpoint's name, the same wherever the model was loaded from."""
    patch = "x".join(str(side) for side in dict.fromkeys(_pair(config.patch_size)))
    return f"{type(model).__name__}-{config.num_hidden_layers}x{config.hidden_size}-patch{patch}"


def pool_token_macs(pool: Any) -> int:
    """MACs of SigLIP's attention pooling per token it reads: key, value, and attention of its one query."""
    if pool is None:
        return 0
    width = int(pool.attention.embed_dim)
    return 2 * width * width + 2 * width


def tensor_of(result: Any) -> Tensor:
    """Logits, else the projected or pooled image, else the tokens, from what the model returns."""
    if isinstance(result, tuple):  # return_dict=False: the same order, without names
        first: Tensor = result[0]
        return first
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        value: Tensor | None = getattr(result, name, None)
        if value is not None:
            return value
    raise TypeError(f"{type(result).__name__} holds no image features that cpvit knows")


def why_blocked(host: Host, extra: HostArguments) -> str | None:
    """What transformers would do around its layers, which a pruned model does not call."""
    layers = [block.module for block in host.blocks]
    if torch.is_grad_enabled() and any(layer.training and layer.gradient_checkpointing for layer in layers):
        return (
            "transformers' own gradient checkpointing has no effect on a pruned model; switch it off "
            "(model.gradient_checkpointing_disable()) and use prune_(..., checkpointing=True)"
        )
    for name in ("output_hidden_states", "output_attentions"):
        if extra.get(name, getattr(host.parent.config, name, False)):
            return (
                f"{name} is recorded by hooks on the layers, which a pruned model does not call: it would "
                "come back empty; use record(model) for what the pruning did, or call unprune_(model) first"
            )
    return None
