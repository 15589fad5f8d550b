"""The models of the support table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cpvit.measure.support_models import (
    Case,
    clip_tower,
    dinov2_case,
    dinov3_tower,
    open_clip_case,
    original_case,
    perception_tower,
    timm_case,
    torchvision_case,
    transformers_case,
)

__all__ = ["CASES", "Case", "representatives"]


def _family(family: str, names: str) -> tuple[Case, ...]:
    return tuple(timm_case(name, family) for name in names.split())


_HF_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


_HF_HUGE = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}


_DINOV3_HUGE: dict[str, Any] = {
    **{"width": 1280, "depth": 32, "heads": 20, "patch": 16, "grid": 14},
    **{"ffn_layer": "swiglu", "ffn_ratio": 6.0},
}


_HF_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}


CASES: tuple[Case, ...] = (
    *_family(
        "ViT",
        "vit_tiny_patch16_224 vit_small_patch32_224 vit_base_patch16_224 vit_base_patch8_224 "
        "vit_large_patch16_224 vit_huge_patch14_224 vit_small_patch16_36x1_224",
    ),
    timm_case("vit_base_patch16_224", "ViT", grid=(5, 9), note=", image of 5 x 9 patches"),
    timm_case("vit_base_patch16_224", "ViT", note=", q/k norm", qk_norm=True),
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
    *_family(
        "NaFlexViT",
        "naflexvit_base_patch16_gap naflexvit_so400m_patch16_siglip naflexvit_base_patch16_parfac_gap",
    ),
    *_family("BEiT", "beit_base_patch16_224 beit_large_patch16_512"),
    *_family("BEiT v2", "beitv2_base_patch16_224 beitv2_large_patch16_224"),
    *(open_clip_case(name, "open_clip ViT") for name in ("ViT-B-32", "ViT-L-14-quickgelu", "ViT-bigG-14")),
    open_clip_case("ViT-H-14-CLIPA", "open_clip ViT, average pooling"),
    open_clip_case("coca_ViT-B-32", "open_clip ViT, attention pooling"),
    dinov2_case("dinov2_vits14"),
    dinov2_case("dinov2_vitg14"),
    dinov2_case("dinov2_vits14", ", registers", num_register_tokens=4),
    original_case(
        "dinov3", "dinov3_vits16", "DINOv3", dinov3_tower, width=384, depth=12, heads=6, patch=16, grid=14
    ),
    original_case("dinov3", "dinov3_vith16plus", "DINOv3", dinov3_tower, **_DINOV3_HUGE),
    original_case(
        "clip.model", "CLIP ViT-B/32", "CLIP", clip_tower, width=768, depth=12, heads=12, patch=32, grid=7
    ),
    original_case(
        "core.vision_encoder",
        "PE-Core-B16-224",
        "Perception Encoder",
        perception_tower,
        **{"width": 768, "depth": 12, "heads": 12, "patch": 16, "grid": 14, "use_cls_token": True},
    ),
    *(torchvision_case(name) for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")),
    transformers_case("ViTForImageClassification", "transformers ViT", ", base"),
    transformers_case("ViTForImageClassification", "transformers ViT", ", large", **_HF_LARGE),
    transformers_case("ViTModel", "transformers ViT", ", base"),
    transformers_case("DeiTForImageClassification", "transformers DeiT", ", small", **_HF_SMALL),
    transformers_case("DeiTForImageClassificationWithTeacher", "transformers DeiT", ", base"),
    transformers_case("Dinov2Model", "transformers DINOv2", ", small", patch_size=14, **_HF_SMALL),
    transformers_case(
        "Dinov2ForImageClassification",
        "transformers DINOv2",
        ", giant",
        patch_size=14,
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        use_swiglu_ffn=True,
    ),
    transformers_case(
        "Dinov2WithRegistersModel", "transformers DINOv2, registers", ", small", patch_size=14, **_HF_SMALL
    ),
    transformers_case("CLIPVisionModelWithProjection", "transformers CLIP", ", base", patch_size=32),
    transformers_case(
        "CLIPForImageClassification", "transformers CLIP", ", large", patch_size=14, **_HF_LARGE
    ),
    transformers_case("DINOv3ViTModel", "transformers DINOv3", ", small", num_register_tokens=4, **_HF_SMALL),
    transformers_case(
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
    transformers_case(
        "BeitForImageClassification", "transformers BEiT", ", base", use_relative_position_bias=True
    ),
    transformers_case("BeitModel", "transformers BEiT", ", base", use_shared_relative_position_bias=True),
    transformers_case(
        "Data2VecVisionForImageClassification",
        "transformers Data2Vec",
        ", base",
        use_relative_position_bias=True,
    ),
    transformers_case("ViTMSNForImageClassification", "transformers ViT-MSN", ", base"),
    transformers_case(
        "IJepaForImageClassification", "transformers I-JEPA", ", huge", patch_size=14, **_HF_HUGE
    ),
    transformers_case("Aimv2VisionModel", "transformers AIMv2", ", large", patch_size=14, **_HF_LARGE),
    transformers_case(
        "InternVLVisionModel",
        "transformers InternVL",
        ", 300M",
        patch_size=14,
        attention_bias=True,
        layer_scale_init_value=0.1,
        **_HF_LARGE,
    ),
    transformers_case("ChineseCLIPVisionModel", "transformers Chinese-CLIP", ", base"),
    transformers_case(
        "MetaClip2ForImageClassification", "transformers MetaCLIP 2", ", huge", patch_size=14, **_HF_HUGE
    ),
    transformers_case("AltCLIPVisionModel", "transformers AltCLIP", ", large", patch_size=14, **_HF_LARGE),
    transformers_case("BlipVisionModel", "transformers BLIP", ", base"),
    transformers_case("OwlViTVisionModel", "transformers OWL-ViT", ", base", patch_size=32),
    transformers_case("GitVisionModel", "transformers GIT", ", base"),
    transformers_case("MLCDVisionModel", "transformers MLCD", ", large", patch_size=14, **_HF_LARGE),
    transformers_case("VideoMAEForVideoClassification", "transformers VideoMAE", ", base", tubelet_size=2),
    transformers_case(
        "VivitForVideoClassification", "transformers ViViT", ", base", tubelet_size=[2, 16, 16]
    ),
    transformers_case("Idefics3VisionTransformer", "transformers Idefics3"),
    transformers_case("SmolVLMVisionTransformer", "transformers SmolVLM"),
    transformers_case("DPTModel", "transformers DPT"),
    transformers_case("SiglipVisionModel", "transformers SigLIP", ", base"),
    transformers_case("SiglipForImageClassification", "transformers SigLIP", ", large", **_HF_LARGE),
)
"""Every family, at sizes from tiny to huge."""


def representatives(cases: Iterable[Case] = CASES) -> tuple[Case, ...]:
    """The first case of every family."""
    return tuple({case.family: case for case in reversed(tuple(cases))}.values())[::-1]
