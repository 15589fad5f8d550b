"""The models of the support table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

DEPTH, HEADS, GRID, CLASSES = 4, 6, (8, 8), 10


@dataclass(frozen=True)
class Case:
    """A model of the support table."""

    name: str
    family: str
    full: Callable[[], nn.Module]
    """The full model; only ever called on the meta device."""
    small: Callable[[], nn.Module]
    """The same architecture, small."""
    arguments: Mapping[str, object] = field(default_factory=dict)
    """What cannot be read off the model (see ``save_pruned``)."""
    needs_transformers: bool = False


def _timm(
    name: str, family: str, *, grid: tuple[int, int] = GRID, note: str = "", **arguments: object
) -> Case:
    full = partial(timm.create_model, name, **arguments)
    return Case(f"{name}{note}", family, full, partial(_small_timm, name, grid, arguments), arguments)


def _small_timm(name: str, grid: tuple[int, int], arguments: Mapping[str, object]) -> nn.Module:
    with torch.device("meta"):
        patch = timm.create_model(name).patch_embed.patch_size
    small: nn.Module = timm.create_model(
        name,
        img_size=(grid[0] * patch[0], grid[1] * patch[1]),
        embed_dim=_width(patch[0]),
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=CLASSES,
        **arguments,
    )
    return small


def _width(patch: int) -> int:
    """Narrower, and cutting the image into patches would cost more than the blocks that are pruned."""
    return 192 if patch >= 32 else 96


def _torchvision(name: str) -> Case:
    return Case(name, "torchvision ViT", partial(_full_torchvision, name), partial(_small_torchvision, name))


def _full_torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None)
    return model


def _small_torchvision(name: str) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    patch = int(name.rpartition("_")[2])
    width = _width(patch)
    model: nn.Module = VisionTransformer(
        GRID[0] * patch, patch, DEPTH, HEADS, width, 4 * width, num_classes=CLASSES
    )
    return model


def _transformers(kind: str, family: str, note: str = "", **values: object) -> Case:
    return Case(
        f"{kind}{note}",
        family,
        partial(_full_transformers, kind, values),
        partial(_small_transformers, kind, values),
        needs_transformers=True,
    )


def _full_transformers(kind: str, values: Mapping[str, object]) -> nn.Module:
    import transformers

    return _from_config(getattr(transformers, kind), values)


def _small_transformers(kind: str, values: Mapping[str, object]) -> nn.Module:
    import transformers

    found: Any = getattr(transformers, kind)
    patch = values.get("patch_size", 16)
    assert isinstance(patch, int)
    video = {"num_frames": 4} if "tubelet_size" in values else {}
    small: dict[str, object] = {
        "hidden_size": _width(patch),
        "intermediate_size": 4 * _width(patch),
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": GRID[0] * patch,
        "patch_size": patch,
        "num_labels": CLASSES,
        **video,
    }
    return _from_config(found, {**values, **small})


def _from_config(kind: Any, values: Mapping[str, object]) -> nn.Module:
    """Classifiers of two-tower models keep the values of the image tower one level down."""
    if not kind.__name__.startswith(_TWO_TOWERS) or not kind.__name__.endswith("ForImageClassification"):
        model: nn.Module = kind(kind.config_class(**values))
        return model
    tower = {name: value for name, value in values.items() if name != "num_labels"}
    labels = {"num_labels": values["num_labels"]} if "num_labels" in values else {}
    classifier: nn.Module = kind(kind.config_class(vision_config=tower, text_config=_TEXT, **labels))
    return classifier


_TWO_TOWERS = ("CLIP", "Siglip", "MetaClip2")


_TEXT = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""Of the text towers, which are not part of the classifiers."""


def _family(family: str, names: str) -> tuple[Case, ...]:
    return tuple(_timm(name, family) for name in names.split())


_HF_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


_HF_HUGE = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}


_HF_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}


CASES: tuple[Case, ...] = (
    *_family(
        "ViT",
        "vit_tiny_patch16_224 vit_small_patch32_224 vit_base_patch16_224 vit_base_patch8_224 "
        "vit_large_patch16_224 vit_huge_patch14_224 vit_small_patch16_36x1_224",
    ),
    _timm("vit_base_patch16_224", "ViT", grid=(5, 9), note=", image of 5 x 9 patches"),
    _timm("vit_base_patch16_224", "ViT", note=", q/k norm", qk_norm=True),
    *_family("ViT, AugReg", "vit_tiny_patch16_224.augreg_in21k vit_base_patch32_384.augreg_in21k_ft_in1k"),
    *_family("ViT, average pooling", "vit_medium_patch16_gap_240 vit_huge_patch14_gap_224"),
    *_family("ViT, registers", "vit_little_patch16_reg1_gap_256 vit_base_patch16_reg4_gap_256"),
    *_family("ViT, registers and attention pooling", "vit_so150m_patch16_reg4_map_256"),
    *_family("ViT, norm after attention", "vit_base_patch16_rpn_224"),
    *_family("ViT, relative positions", "vit_relpos_small_patch16_224 vit_relpos_base_patch16_cls_224"),
    *_family("ViT, shared relative positions", "vit_srelpos_small_patch16_224"),
    *_family("AIMv2", "aimv2_large_patch14_224"),
    *_family("InternViT", "vit_intern300m_patch14_448"),
    *_family("MAE", "vit_base_patch16_224.mae vit_large_patch16_224.mae vit_huge_patch14_224.mae"),
    *_family("DeiT", "deit_tiny_patch16_224 deit_small_patch16_224 deit_base_patch16_384"),
    *_family("DeiT, distilled", "deit_tiny_distilled_patch16_224 deit_base_distilled_patch16_384"),
    *_family(
        "DeiT-III",
        "deit3_small_patch16_224 deit3_medium_patch16_224 deit3_base_patch16_384 deit3_large_patch16_224 "
        "deit3_huge_patch14_224",
    ),
    *_family(
        "CLIP",
        "vit_base_patch32_clip_224 vit_base_patch16_clip_quickgelu_224 vit_large_patch14_clip_336 "
        "vit_giant_patch14_clip_224",
    ),
    *_family("SigLIP", "vit_base_patch16_siglip_224 vit_so400m_patch14_siglip_384"),
    *_family("SigLIP, average pooling", "vit_base_patch16_siglip_gap_224"),
    *_family("DINOv2", "vit_small_patch14_dinov2 vit_large_patch14_dinov2 vit_giant_patch14_dinov2"),
    *_family("DINOv2, registers", "vit_small_patch14_reg4_dinov2 vit_giant_patch14_reg4_dinov2"),
    *_family("DINOv3", "vit_small_patch16_dinov3 vit_huge_plus_patch16_dinov3 vit_7b_patch16_dinov3"),
    *_family("EVA", "eva_large_patch14_196 eva_giant_patch14_224"),
    *_family("EVA-02", "eva02_tiny_patch14_224 eva02_base_patch14_448 eva02_base_patch16_clip_224"),
    *_family("Perception Encoder", "vit_pe_core_tiny_patch16_384 vit_pe_spatial_base_patch16_512"),
    *_family("ViT, rotary", "vit_base_patch16_rope_224"),
    *_family("ViT, rotary per head", "vit_base_patch16_rope_mixed_224"),
    *_family("BEiT", "beit_base_patch16_224 beit_large_patch16_512"),
    *_family("BEiT v2", "beitv2_base_patch16_224 beitv2_large_patch16_224"),
    *(_torchvision(name) for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")),
    _transformers("ViTForImageClassification", "transformers ViT", ", base"),
    _transformers("ViTForImageClassification", "transformers ViT", ", large", **_HF_LARGE),
    _transformers("ViTModel", "transformers ViT", ", base"),
    _transformers("DeiTForImageClassification", "transformers DeiT", ", small", **_HF_SMALL),
    _transformers("DeiTForImageClassificationWithTeacher", "transformers DeiT", ", base"),
    _transformers("Dinov2Model", "transformers DINOv2", ", small", patch_size=14, **_HF_SMALL),
    _transformers(
        "Dinov2ForImageClassification",
        "transformers DINOv2",
        ", giant",
        patch_size=14,
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        use_swiglu_ffn=True,
    ),
    _transformers(
        "Dinov2WithRegistersModel", "transformers DINOv2, registers", ", small", patch_size=14, **_HF_SMALL
    ),
    _transformers("CLIPVisionModelWithProjection", "transformers CLIP", ", base", patch_size=32),
    _transformers("CLIPForImageClassification", "transformers CLIP", ", large", patch_size=14, **_HF_LARGE),
    _transformers("DINOv3ViTModel", "transformers DINOv3", ", small", num_register_tokens=4, **_HF_SMALL),
    _transformers(
        "DINOv3ViTModel",
        "transformers DINOv3",
        ", huge plus",
        num_register_tokens=4,
        use_gated_mlp=True,
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
    ),
    _transformers(
        "BeitForImageClassification", "transformers BEiT", ", base", use_relative_position_bias=True
    ),
    _transformers("BeitModel", "transformers BEiT", ", base", use_shared_relative_position_bias=True),
    _transformers(
        "Data2VecVisionForImageClassification",
        "transformers Data2Vec",
        ", base",
        use_relative_position_bias=True,
    ),
    _transformers("ViTMSNForImageClassification", "transformers ViT-MSN", ", base"),
    _transformers("IJepaForImageClassification", "transformers I-JEPA", ", huge", patch_size=14, **_HF_HUGE),
    _transformers("Aimv2VisionModel", "transformers AIMv2", ", large", patch_size=14, **_HF_LARGE),
    _transformers(
        "InternVLVisionModel",
        "transformers InternVL",
        ", 300M",
        patch_size=14,
        attention_bias=True,
        layer_scale_init_value=0.1,
        **_HF_LARGE,
    ),
    _transformers("ChineseCLIPVisionModel", "transformers Chinese-CLIP", ", base"),
    _transformers(
        "MetaClip2ForImageClassification", "transformers MetaCLIP 2", ", huge", patch_size=14, **_HF_HUGE
    ),
    _transformers("AltCLIPVisionModel", "transformers AltCLIP", ", large", patch_size=14, **_HF_LARGE),
    _transformers("BlipVisionModel", "transformers BLIP", ", base"),
    _transformers("OwlViTVisionModel", "transformers OWL-ViT", ", base", patch_size=32),
    _transformers("GitVisionModel", "transformers GIT", ", base"),
    _transformers("MLCDVisionModel", "transformers MLCD", ", large", patch_size=14, **_HF_LARGE),
    _transformers("VideoMAEForVideoClassification", "transformers VideoMAE", ", base", tubelet_size=2),
    _transformers("SiglipVisionModel", "transformers SigLIP", ", base"),
    _transformers("SiglipForImageClassification", "transformers SigLIP", ", large", **_HF_LARGE),
)
"""Every family, at sizes from tiny to huge."""


def representatives(cases: Iterable[Case] = CASES) -> tuple[Case, ...]:
    """The first case of every family."""
    return tuple({case.family: case for case in reversed(tuple(cases))}.values())[::-1]
