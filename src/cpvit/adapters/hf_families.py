"""What cannot be read off the modules of a model of Hugging Face transformers.

Titles for the support table, classifiers that read the class token alone, and classes that are refused by name
although their layers are plain. A class that is in none of these lists can be pruned all the same, if its parts are
known (``hf_parts``, ``hf_tower``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_TITLES = (
    "aimv2_vision_model=AIMv2, altclip_vision_model=AltCLIP, beit=BEiT, blip_2_vision_model=BLIP-2, "
    "blip_vision_model=BLIP, chinese_clip_vision_model=Chinese-CLIP, clip=CLIP, clip_vision_model=CLIP, "
    "clipseg_vision_model=CLIPSeg, data2vec-vision=Data2Vec, deit=DeiT, dinov2=DINOv2, "
    "dinov2_with_registers=DINOv2 with registers, dinov3_vit=DINOv3, dpt=DPT, flava_image_model=FLAVA, "
    "git_vision_model=GIT, idefics3_vision=Idefics3, ijepa=I-JEPA, instructblip_vision_model=InstructBLIP, "
    "instructblipvideo_vision_model=InstructBLIP, internvl_vision=InternVL, janus_vision_model=Janus, "
    "kosmos_2_vision_model=Kosmos-2, metaclip_2=MetaCLIP 2, metaclip_2_vision_model=MetaCLIP 2, "
    "mlcd_vision_model=MLCD, pixio=Pixio, owlv2_vision_model=OWLv2, owlvit_vision_model=OWL-ViT, "
    "idefics2_vision=Idefics2, smolvlm_vision=SmolVLM, siglip=SigLIP, siglip_vision_model=SigLIP, "
    "tipsv2_vision_model=TIPS v2, videomae=VideoMAE, vit=ViT, vit_mae=ViT-MAE, vit_msn=ViT-MSN, vivit=ViViT"
)
TITLES: Mapping[str, str] = MappingProxyType(dict(pair.split("=", 1) for pair in _TITLES.split(", ")))
"""Model type of the configuration -> title; others are called by their type."""

READS_CLASS_TOKEN = (
    *("ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
    *("ViTMSNForImageClassification", "VivitForVideoClassification"),
)
"""Classifiers that read prefix tokens alone, so that what leaves the last block is free."""

AVERAGES_IF_TOLD = (
    "BeitForImageClassification",
    "Data2VecVisionForImageClassification",
    "VideoMAEForVideoClassification",
)
"""Classifiers that average the patches if ``config.use_mean_pooling``, and read the first token if not."""

IN_TUPLES = ("Data2VecVisionLayer", "FlavaLayer")
"""Layers that return a tuple, of which the tokens are the first (what they are annotated with does not say)."""

ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Model types whose embeddings take images of any size."""

SET_IMAGE_SIZE = "set model.config.image_size to it first"

_WRAPS_TIMM = "it wraps a model of timm; prune that one: prune_(model.timm_model, ...)"
_NAFLEX = (
    "it takes images cut into a varying number of patches with a mask; the SigLIP 2 checkpoints of one fixed "
    "resolution load as SiglipVisionModel and can be pruned"
)

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "TimmWrapperModel": _WRAPS_TIMM,
        "TimmWrapperForImageClassification": _WRAPS_TIMM,
        "Siglip2Model": _NAFLEX,
        "Siglip2VisionModel": _NAFLEX,
        "Siglip2ForImageClassification": _NAFLEX,
        "PixtralVisionModel": "it packs the images of a batch into one sequence, so that none can lose patches alone",
    }
)
