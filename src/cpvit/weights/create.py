"""Create a Vision Transformer by name: timm's, those of the original CP-ViT code, of other libraries, or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from torch import nn

from cpvit.weights.libraries import (
    HF_PREFIX,
    create_transformers,
    is_saved_folder,
    open_folder,
    torchvision_config,
)
from cpvit.weights.open_clip_models import OPEN_CLIP_PREFIX, create_open_clip

ORIGINAL_MODELS: Mapping[str, str] = MappingProxyType(
    {
        "ViT-B_16": "vit_base_patch16_224",
        "ViT-B_32": "vit_base_patch32_224",
        "ViT-L_16": "vit_large_patch16_224",
        "ViT-L_32": "vit_large_patch32_224",
        "ViT-H_14": "vit_huge_patch14_224",
    }
)
"""Names of the original CP-ViT code and the timm architecture each one is (LayerNorm eps 1e-6, qkv bias)."""

_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_TORCHVISION_PREFIXES = ("torchvision/", "torchvision:")


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    drop_path: float = 0.0,
) -> nn.Module:
    """Create a model in eval mode: images [B 3 H W] -> logits [B num_classes].

    Args:
        name: A timm name (``deit_tiny_patch16_224``, ``vit_base_patch16_224.augreg_in21k``, ``hf-hub:...``),
            a key of :data:`ORIGINAL_MODELS`, torchvision's name behind ``torchvision:`` (``torchvision:vit_b_16``),
            a folder or name of the Hugging Face hub behind ``hf:``, open_clip's name behind ``open_clip:``
            (``open_clip:ViT-B-32``, with the tag of the weights ``open_clip:ViT-B-32:openai``), or a folder that
            :func:`~cpvit.save_pruned` or transformers wrote, which brings its weights.
        num_classes: Size of the classification head. None takes timm's choice for that name, which is no head
            at all for names whose weights have none (``ViT-L_32`` and ``ViT-H_14`` among them).
        image_size: Side of the input, or (height, width); None takes the model's own. Must be a multiple of
            the patch size.
        pretrained: Download the weights. They are never downloaded otherwise.
        drop_path: Probability that the deepest block is skipped in training, falling to 0 at the first
            (stochastic depth, arXiv 1603.09382); timm's models only.

    Raises:
        ValueError: The name is unknown, or a size or a probability is impossible.

    Example:
        >>> create_model("vit_tiny_patch16_224", num_classes=10, image_size=96).num_classes
        10
    """
    import timm

    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}; give 0 (no head) or more")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path is {drop_path}; give a probability of at least 0 and below 1")
    size = _checked_size(image_size)
    if name.startswith((*_TORCHVISION_PREFIXES, HF_PREFIX, OPEN_CLIP_PREFIX)) or is_saved_folder(name):
        if drop_path:
            raise ValueError(f"{name} has no stochastic depth, got drop_path={drop_path}; leave it out")
        return _create_elsewhere(name, num_classes, size, pretrained)
    timm_name = resolve_model_name(name)
    options: dict[str, object] = {} if num_classes is None else {"num_classes": num_classes}
    if size is not None:
        options["img_size"] = size
    if drop_path:
        options["drop_path_rate"] = drop_path
    try:
        model: nn.Module = timm.create_model(timm_name, pretrained=pretrained, **options)
    except TypeError as error:
        if size is None or "img_size" not in str(error):
            raise
        raise ValueError(
            f"{name} has no fixed image size, got image_size={image_size}; leave it out"
        ) from error
    _check_patches_fit(model, name, size)
    return model.eval()


def _create_elsewhere(
    name: str, num_classes: int | None, size: tuple[int, int] | None, pretrained: bool
) -> nn.Module:
    """A model of another library than timm."""
    if name.startswith(_TORCHVISION_PREFIXES):
        return _create_torchvision(name, num_classes, size, pretrained)
    if size is not None:
        raise ValueError(f"{name} has a size of its own, got image_size={size}; leave it out")
    if num_classes is not None and (name.startswith(OPEN_CLIP_PREFIX) or is_saved_folder(name)):
        raise ValueError(f"{name} has the head it has, got num_classes={num_classes}; leave it out")
    if is_saved_folder(name):
        return open_folder(name)
    if name.startswith(OPEN_CLIP_PREFIX):
        return create_open_clip(name.removeprefix(OPEN_CLIP_PREFIX), pretrained=pretrained)
    return create_transformers(name.removeprefix(HF_PREFIX), num_classes, pretrained=pretrained)


def _create_torchvision(
    name: str, num_classes: int | None, size: tuple[int, int] | None, pretrained: bool
) -> nn.Module:
    from torchvision import models

    known = models.list_models(include="vit_*")
    own_name = name[len(_TORCHVISION_PREFIXES[0]) :]
    if own_name not in known:
        raise ValueError(f"unknown model {name!r}; torchvision has {', '.join(known)}")
    if size is not None and size[0] != size[1]:
        raise ValueError(f"{name} takes square images only, got image_size={size[0]}x{size[1]}")
    options: dict[str, object] = {} if num_classes is None else {"num_classes": num_classes}
    if size is not None:
        options["image_size"] = size[0]
    model: nn.Module = models.get_model(own_name, weights="DEFAULT" if pretrained else None, **options)
    weights = models.get_model_weights(own_name)["DEFAULT"]
    vars(model)["pretrained_cfg"] = torchvision_config(weights, size[0] if size else 0)
    return model.eval()


def resolve_model_name(name: str) -> str:
    """Turn a model name into the one timm knows; Hugging Face hub names pass through unchanged.

    Raises:
        ValueError: Neither timm nor :data:`ORIGINAL_MODELS` has the name; the closest names are suggested.

    Example:
        >>> resolve_model_name("ViT-B_16")
        'vit_base_patch16_224'
    """
    import timm

    if name in ORIGINAL_MODELS:
        return ORIGINAL_MODELS[name]
    if name.startswith(_HUB_PREFIXES):
        return name
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"unknown model {name!r}; {_suggestion(architecture)}")
    known = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in known:
        raise ValueError(f"unknown weights {tag!r} of {architecture}; timm has {', '.join(known)}")
    return name


def _suggestion(name: str) -> str:
    import timm

    names = [*ORIGINAL_MODELS, *timm.list_models()]
    close = get_close_matches(name, names, n=3)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"give a name that timm.list_models() lists, or one of {', '.join(ORIGINAL_MODELS)}"


def _checked_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size is {image_size}; give one positive number or (height, width)")
    return size[0], size[1]


def _check_patches_fit(model: nn.Module, name: str, size: tuple[int, int] | None) -> None:
    """Raise ValueError here: timm rounds the grid down and fails only in the first forward."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size is None or patch is None:
        return
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(
            f"image size {size[0]}x{size[1]} is not a multiple of the {patch[0]}x{patch[1]} patches of {name}"
        )
