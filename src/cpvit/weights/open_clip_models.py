"""Create models of open_clip by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

OPEN_CLIP_PREFIX = "open_clip:"


def create_open_clip(name: str, *, pretrained: bool) -> nn.Module:
    """The image tower of a model of open_clip; see :func:`create_open_clip_towers`."""
    return create_open_clip_towers(name, pretrained=pretrained)[1]


def create_open_clip_towers(
    name: str, *, pretrained: bool, weights: str | None = None
) -> tuple[Any, nn.Module]:
    """A model of open_clip, and its image tower (that of timm where it wraps one).

    Args:
        name: Without the prefix ``open_clip:``; behind another colon the tag of its weights.
        pretrained: Load the weights of that tag.
        weights: A file of weights to load instead.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: There is no such model, or no such weights.
    """
    open_clip = imported("open_clip", "open_clip_torch")
    architecture, _, tag = name.partition(":")
    if architecture not in open_clip.list_models():
        raise ValueError(
            f"unknown model {architecture!r}; open_clip has {', '.join(open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained and tag not in tags:
        names = ", ".join(tags) or "none"
        raise ValueError(f"name the weights, as in {OPEN_CLIP_PREFIX}{architecture}:TAG; there are {names}")
    # It moves the model to a device of its own choice otherwise, which fails on the meta device.
    towers = open_clip.create_model(
        architecture, pretrained=tag if pretrained else weights, device=torch.get_default_device()
    ).eval()
    visual = towers.visual
    model, known = getattr(visual, "trunk", visual), visual.preprocess_cfg
    size = known["size"]
    # A model of timm's keeps its own name.
    own = dict(getattr(model, "pretrained_cfg", None) or {"architecture": architecture})
    model.pretrained_cfg = {
        **own,
        "input_size": (3, size, size) if isinstance(size, int) else (3, *size),
        "mean": tuple(known["mean"]),
        "std": tuple(known["std"]),
        "interpolation": known["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": "squash" if known["resize_mode"] == "squash" else "center",
    }
    return towers, model


def imported(library: str, package: str) -> Any:
    """A library that may not be installed.

    Raises:
        ImportError: It is not; the message names the package.
    """
    try:
        return __import__(library)
    except ImportError as error:
        raise ImportError(f"{library} is not installed: pip install '{package}'") from error
