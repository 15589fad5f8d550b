"""How the models of the support table are built, whole and small."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
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
    package: str = ""
    """What has to be installed besides what cpvit needs."""
    by_hand: bool = False
    """Whether the small model cannot be built from a saved folder alone: its sizes are those of no name."""


def timm_case(
    name: str, family: str, *, grid: tuple[int, int] = GRID, note: str = "", **arguments: object
) -> Case:
    """A model of timm."""
    full = partial(timm.create_model, name, **arguments)
    return Case(f"{name}{note}", family, full, partial(_small_timm, name, grid, arguments), arguments)


def _small_timm(name: str, grid: tuple[int, int], arguments: Mapping[str, object]) -> nn.Module:
    with torch.device("meta"):
        full: Any = timm.create_model(name)
        patch = getattr(full, "patch_embed", None) or full.embeds
        patch = patch.patch_size
    small: Any = timm.create_model(
        name,
        img_size=(grid[0] * patch[0], grid[1] * patch[1]),
        embed_dim=_width(patch[0]),
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=CLASSES,
        **arguments,
    )
    if hasattr(small, "embeds"):  # takes images of any size
        small.pretrained_cfg["input_size"] = (3, grid[0] * patch[0], grid[1] * patch[1])
    model: nn.Module = small
    return model


def _width(patch: int) -> int:
    """Narrower, and cutting the image into patches would cost more than the blocks that are pruned."""
    return 192 if patch >= 32 else 96


def torchvision_case(name: str) -> Case:
    """A model of torchvision."""
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


def transformers_case(kind: str, family: str, note: str = "", **values: object) -> Case:
    """A class of transformers, with values of its configuration."""
    return Case(
        f"{kind}{note}",
        family,
        partial(_full_transformers, kind, values),
        partial(_small_transformers, kind, values),
        package="transformers",
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


def open_clip_case(name: str, family: str) -> Case:
    """The image tower of an architecture of open_clip."""
    return Case(
        f"open_clip {name}",
        family,
        partial(_open_clip_tower, name, {}),
        partial(_small_open_clip, name),
        package="open_clip",
        by_hand=True,
    )


def _small_open_clip(name: str) -> nn.Module:
    import open_clip

    patch = open_clip.get_model_config(name)["vision_cfg"].get("patch_size", 16)
    width = _width(patch)
    small = {"image_size": GRID[0] * patch, "layers": DEPTH, "width": width, "head_width": width // HEADS}
    return _open_clip_tower(name, small)


def _open_clip_tower(name: str, values: Mapping[str, object]) -> nn.Module:
    import open_clip
    from open_clip.model import _build_vision_tower

    config = open_clip.get_model_config(name)
    vision = {**config["vision_cfg"], **values}
    model: nn.Module = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
    return model


def original_case(
    package: str, name: str, family: str, build: Callable[..., nn.Module], **sizes: object
) -> Case:
    """Code that is no package of an index: its folder has to be on the path. ``build`` makes it of width, depth ..."""
    small = {"width": _width(int(str(sizes["patch"]))), "depth": DEPTH, "heads": HEADS}
    return Case(
        f"{name} of the original code",
        f"{family}, original code",
        partial(build, **sizes),
        partial(build, **{**sizes, **small, "grid": GRID[0]}),
        package=package,
        by_hand=True,
    )


def clip_tower(*, width: int, depth: int, heads: int, patch: int, grid: int) -> nn.Module:
    """OpenAI's image tower."""
    module: Any = importlib.import_module("clip.model")
    model: nn.Module = module.VisionTransformer(grid * patch, patch, width, depth, heads, 512)
    return model


def dinov3_tower(*, width: int, depth: int, heads: int, patch: int, grid: int, **values: object) -> nn.Module:
    """DINOv3 as it was released: with storage tokens and a mask on the bias of the keys."""
    module: Any = importlib.import_module("dinov3.models.vision_transformer")
    released = {"n_storage_tokens": 4, "layerscale_init": 1e-5, "mask_k_bias": True, **values}
    model: Any = module.DinoVisionTransformer(
        img_size=grid * patch, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, **released
    )
    model.init_weights()
    built: nn.Module = model
    return built


def perception_tower(
    *, width: int, depth: int, heads: int, patch: int, grid: int, **values: object
) -> nn.Module:
    """Meta's Perception Encoder."""
    module: Any = importlib.import_module("core.vision_encoder.pe")
    model: nn.Module = module.VisionTransformer(
        patch, width, depth, heads, 4.0, image_size=grid * patch, **values
    )
    return model


def dinov2_case(name: str, note: str = "", **values: object) -> Case:
    """Of the original repository, whose folder has to be on the path."""
    return Case(
        f"{name} of the original code{note}",
        f"DINOv2, original code{note}",
        partial(_dinov2_model, name, values),
        partial(
            _dinov2_model,
            name,
            {**values, "img_size": 14 * GRID[0], "embed_dim": _width(14), "depth": DEPTH, "num_heads": HEADS},
        ),
        package="dinov2",
        by_hand=True,
    )


def _dinov2_model(name: str, values: Mapping[str, object]) -> nn.Module:
    module: Any = importlib.import_module("dinov2.models.vision_transformer")
    block = partial(module.Block, attn_class=module.MemEffAttention)
    sizes = _DINOV2_SIZES[name] | {"img_size": 518, "patch_size": 14, "block_chunks": 0, "init_values": 1.0}
    model: nn.Module = module.DinoVisionTransformer(**{**sizes, "block_fn": block, **values})
    return model


_DINOV2_SIZES: dict[str, dict[str, object]] = {
    "dinov2_vits14": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "dinov2_vitg14": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn_layer": "swiglufused"},
}
