"""Hugging Face transformers: ViT, DeiT, DINOv2 (with and without registers), CLIP and SigLIP image towers.

Every name that transformers gives to its modules is in this file, in the tables below. The names moved within
version 5, so one range of versions is supported and checked. transformers itself is never imported here: a
model that comes from it has imported it.

The grid is the one of ``config.image_size``. Two things that transformers does around its layers, which a
pruned model does not call, are refused rather than left undone: recording (``output_hidden_states``,
``output_attentions``) and its own gradient checkpointing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cpvit.adapters.common import join_heads, linear_heads, linear_macs
from cpvit.adapters.host import BlockCosts, HeadParameter, Host, UnsupportedModelError
from cpvit.attention import AttentionInputs
from cpvit.core import HostArguments

OLDEST, NEWEST_MAJOR = (5, 18), 5
"""First version whose layers have these names in every family, and the major version they are known for."""

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")
"""The others hand masks of their own kind to the layers, and cannot run where MACs are counted."""


class LayerNames(NamedTuple):
    """What a family calls the parts of its layer, in the order they run."""

    layer: str
    """Class of the layer."""
    attention_class: str
    norm1: str
    attention: str
    projection: str
    after_attention: tuple[str, ...]
    """Modules between the projection and the residual."""
    norm2: str
    after_mlp: tuple[str, ...]
    heads: str
    """Attribute of the attention: number of heads; likewise the next two."""
    scale: str
    dropout: str


class Family(NamedTuple):
    """What the models of one family share."""

    title: str
    layers: str
    """Path from the image tower to its list of layers."""
    names: LayerNames
    num_prefix: int
    """Class and distillation token; registers are counted from the configuration."""
    resizing: str = ""
    """How the tower takes images of another size, if it does."""


class Entry(NamedTuple):
    """A class of transformers that can be pruned."""

    family: Family
    tower: str = ""
    """Attribute that holds the image tower; empty if the model is one."""
    averages: bool = False
    """Whether the model averages its patches before the classifier."""


_VIT_NAMES = LayerNames(
    layer="ViTLayer",
    attention_class="ViTAttention",
    norm1="layernorm_before",
    attention="attention",
    projection="o_proj",
    after_attention=("dropout",),
    norm2="layernorm_after",
    after_mlp=("dropout",),
    heads="num_attention_heads",
    scale="scaling",
    dropout="attention_dropout",
)
_DEIT_NAMES = _VIT_NAMES._replace(layer="DeiTLayer", attention_class="DeiTAttention")
_DINOV2_NAMES = _VIT_NAMES._replace(
    layer="Dinov2Layer",
    attention_class="Dinov2Attention",
    norm1="norm1",
    after_attention=("layer_scale1", "drop_path"),
    norm2="norm2",
    after_mlp=("layer_scale2", "drop_path"),
)
_REGISTERS_NAMES = _DINOV2_NAMES._replace(
    layer="Dinov2WithRegistersLayer", attention_class="Dinov2WithRegistersAttention"
)
_CLIP_NAMES = LayerNames(
    layer="CLIPEncoderLayer",
    attention_class="CLIPAttention",
    norm1="layer_norm1",
    attention="self_attn",
    projection="out_proj",
    after_attention=(),
    norm2="layer_norm2",
    after_mlp=(),
    heads="num_heads",
    scale="scale",
    dropout="dropout",
)
_SIGLIP_NAMES = _CLIP_NAMES._replace(layer="SiglipEncoderLayer", attention_class="SiglipAttention")

_SET_IMAGE_SIZE = "set model.config.image_size to it first"

VIT = Family("transformers ViT", "layers", _VIT_NAMES, 1)
DEIT = Family("transformers DeiT", "layers", _DEIT_NAMES, 2)
DINOV2 = Family("transformers DINOv2", "encoder.layer", _DINOV2_NAMES, 1, _SET_IMAGE_SIZE)
REGISTERS = Family(
    "transformers DINOv2 with registers", "encoder.layer", _REGISTERS_NAMES, 1, _SET_IMAGE_SIZE
)
CLIP = Family("transformers CLIP", "encoder.layers", _CLIP_NAMES, 1)
SIGLIP = Family("transformers SigLIP", "encoder.layers", _SIGLIP_NAMES, 0)

MODELS: Mapping[str, Entry] = MappingProxyType(
    {
        "ViTModel": Entry(VIT),
        "ViTForImageClassification": Entry(VIT, "vit"),
        "DeiTModel": Entry(DEIT),
        "DeiTForImageClassification": Entry(DEIT, "deit"),
        "DeiTForImageClassificationWithTeacher": Entry(DEIT, "deit"),
        "Dinov2Model": Entry(DINOV2),
        "Dinov2ForImageClassification": Entry(DINOV2, "dinov2", averages=True),
        "Dinov2WithRegistersModel": Entry(REGISTERS),
        "Dinov2WithRegistersForImageClassification": Entry(REGISTERS, "dinov2_with_registers", averages=True),
        "CLIPVisionModel": Entry(CLIP),
        "CLIPVisionModelWithProjection": Entry(CLIP, "vision_model"),
        "CLIPForImageClassification": Entry(CLIP, "vision_model", averages=True),
        "SiglipVisionModel": Entry(SIGLIP),
        "SiglipForImageClassification": Entry(SIGLIP, "vision_model", averages=True),
    }
)

_TWO_TOWERS = "it has two towers; prune the one that sees the image: prune_(model.vision_model, ...)"
_WRAPS_TIMM = "it wraps a model of timm; prune that one: prune_(model.timm_model, ...)"
_STAGES = "it returns the patches of every stage; use {} and prune_(..., dense_features=True)"
_DECODES = "it decodes every patch into pixels, also those that would have left"
_NAFLEX = (
    "it takes images cut into a varying number of patches with a mask; the SigLIP 2 checkpoints of one fixed "
    "resolution load as SiglipVisionModel and can be pruned"
)

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "CLIPModel": _TWO_TOWERS,
        "SiglipModel": _TWO_TOWERS,
        "TimmWrapperModel": _WRAPS_TIMM,
        "TimmWrapperForImageClassification": _WRAPS_TIMM,
        "Dinov2Backbone": _STAGES.format("Dinov2Model"),
        "Dinov2WithRegistersBackbone": _STAGES.format("Dinov2WithRegistersModel"),
        "ViTForMaskedImageModeling": _DECODES,
        "DeiTForMaskedImageModeling": _DECODES,
        "Siglip2Model": _NAFLEX,
        "Siglip2VisionModel": _NAFLEX,
        "Siglip2ForImageClassification": _NAFLEX,
    }
)


class TransformersBlock:
    """A pre-norm layer: norm, attention, residual, norm, MLP, residual."""

    def __init__(self, layer: nn.Module, names: LayerNames) -> None:
        self.module: Any = layer
        self.names = names

    @property
    def attn(self) -> Any:
        """The layer's attention module."""
        return getattr(self.module, self.names.attention)

    @property
    def projection(self) -> Any:
        """Output projection of the attention."""
        return getattr(self.attn, self.names.projection)

    @property
    def num_heads(self) -> int:
        """Heads the layer has now."""
        return int(getattr(self.attn, self.names.heads))

    def attention_inputs(  # nothing here depends on the position
        self,
        x: Tensor,
        positions: Tensor | None,
        extra: HostArguments,
    ) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D]."""
        refuse_masks(extra)
        attn, names = self.attn, self.names
        x = getattr(self.module, names.norm1)(x)
        query, key, value = (self._heads(linear(x)) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
        dropout = float(getattr(attn, names.dropout)) if attn.training else 0.0
        return AttentionInputs(query, key, value, scale=getattr(attn, names.scale), dropout=dropout)

    def _heads(self, projected: Tensor) -> Tensor:
        """[B N H*D] -> [B H N D]."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attention_residual(self, x: Tensor, inputs: AttentionInputs, out: Tensor) -> Tensor:
        """x [B N C], out [B H N D] -> [B N C]."""
        return x + self._apply(self.names.after_attention, self.projection(join_heads(out)))

    def mlp_residual(self, x: Tensor) -> Tensor:
        """[B N C] -> [B N C]."""
        normed = getattr(self.module, self.names.norm2)(x)
        return x + self._apply(self.names.after_mlp, self.module.mlp(normed))

    def _apply(self, names: Sequence[str], x: Tensor) -> Tensor:
        """The named modules of the layer, one after the other: [B N C] -> [B N C]."""
        for name in names:
            x = getattr(self.module, name)(x)
        return x

    def costs(self) -> BlockCosts:
        """MACs per token and per pair of tokens."""
        return BlockCosts(
            attention_token=linear_macs(self.attn),
            pair=2 * self.projection.in_features,
            mlp_token=linear_macs(self.module.mlp),
        )

    def head_parameters(self) -> Sequence[HeadParameter]:
        """Rows of Q, K and V and columns of the projection."""
        inputs = [self.attn.q_proj, self.attn.k_proj, self.attn.v_proj]
        for linear in (*inputs, self.projection):
            if type(linear) is not nn.Linear:
                raise UnsupportedModelError(
                    f"heads cannot be pruned where a projection is a {type(linear).__name__} (quantised, or "
                    "with an adapter): its weights cannot be cut; prune patches only (head_keep_rate=1)"
                )
        width = inputs[0].out_features // self.num_heads
        found = [part for linear in inputs for part in linear_heads(linear, 0, 1, width)]
        return [*found, HeadParameter(self.projection, "weight", 1, 1, width)]

    def set_num_heads(self, count: int) -> None:
        """The host's own forward reads its shapes from the weights; it keeps the count for others to read."""
        setattr(self.attn, self.names.heads, count)


def refuse_masks(extra: HostArguments) -> None:
    """Only the arguments that change the attention matter; transformers passes others through its layers.

    While exporting, transformers builds a mask that masks nothing (it drops it otherwise, where it can look
    at it): that one is not an argument of the user's, and is left out of the exported graph.
    """
    given = [name for name in ("attention_mask", "is_causal") if _is_given(extra.get(name))]
    if given and not _exporting():
        raise ValueError(
            f"a pruned model cannot take {' and '.join(given)}: it speaks of patches that may have left"
        )


def _is_given(value: object) -> bool:
    return value is not None and value is not False


def _exporting() -> bool:
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())


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
