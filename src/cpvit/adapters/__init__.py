"""Adapters: one file per library, all behind :func:`open_host`."""

from __future__ import annotations

from torch import nn

from cpvit.adapters.dinov2 import open_dino
from cpvit.adapters.hf import open_hf
from cpvit.adapters.host import BlockCosts, HeadParameter, Host, HostBlock, UnsupportedModelError
from cpvit.adapters.open_clip import open_open_clip
from cpvit.adapters.refusals import refusal
from cpvit.adapters.timm_beit import open_timm_beit
from cpvit.adapters.timm_eva import open_timm_eva, open_timm_naflex
from cpvit.adapters.timm_relpos import open_timm_relpos
from cpvit.adapters.timm_vit import open_timm_vit
from cpvit.adapters.torchvision_vit import open_torchvision_vit

__all__ = ["BlockCosts", "HeadParameter", "Host", "HostBlock", "UnsupportedModelError", "open_host"]

SUPPORTED = (
    "timm VisionTransformer models (ViT, DeiT, DeiT-III, AugReg, CLIP, SigLIP, DINOv2, MAE ...), "
    "timm Eva models (EVA, EVA-02, DINOv3, Perception Encoder, rotary ViTs), timm NaFlexViT, BEiT and BEiT v2, "
    "timm ViTs with relative positions, torchvision vit_b_16 ... vit_h_14, open_clip's VisionTransformer, the original "
    "code of CLIP, DINOv2, DINOv3 and the Perception Encoder, and of Hugging Face transformers every encoder whose "
    "parts are known (ViT, DeiT, DINO, BEiT, I-JEPA, MAE, AIMv2, InternVL, the image towers of CLIP, SigLIP, BLIP ...)"
)

OPENERS = (
    open_timm_vit,
    open_timm_eva,
    open_timm_naflex,
    open_timm_beit,
    open_timm_relpos,
    open_torchvision_vit,
    open_open_clip,
    open_dino,
    open_hf,
)


def open_host(model: nn.Module) -> Host:
    """Find out how to prune a model.

    Raises:
        UnsupportedModelError: The model cannot be pruned; the message says why and names what can.
    """
    for opener in OPENERS:
        host = opener(model)
        if host is not None:
            return host
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be pruned: {refusal(model)}. Supported: {SUPPORTED}."
    )
