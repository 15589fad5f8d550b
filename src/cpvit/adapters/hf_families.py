"""The families of Hugging Face transformers that can be pruned: what their classes and modules are called.

Every module name that differs between families is in this file; those that all share are in ``hf_layer``. The
names moved within version 5, so one range of versions is supported and checked (``hf.check_version``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


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
