"""Every architecture of open_clip: is its image tower pruned, refused with a reason, or does it crash?

    python studies/open_clip_models.py [--json FILE]

The tower of ``open_clip.list_models()`` is built from its own configuration with three layers and 4 x 4 patches, in its
own width; one of timm's with two layers where timm takes that, else whole on the meta device, where it is only opened.
One that is accepted must reproduce its output with everything kept, run pruned, and give an image alone what it gives
it in a batch. Nothing is downloaded. Takes some four minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import _build_vision_tower
from transformers_classes import outcome_of

SIDE = 4
"""Patches."""


def tower(name: str) -> tuple[Any, bool]:
    """The image tower of an architecture, and whether its weights are there."""
    config = open_clip.get_model_config(name)
    vision = dict(config["vision_cfg"])
    if vision.get("timm_model_name"):
        return timm_tower(vision["timm_model_name"], vision.get("timm_pool", ""))
    if isinstance(vision.get("layers", 12), int):
        vision |= {"layers": 3, "image_size": SIDE * vision.get("patch_size", 16)}
    return _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False)), True


def timm_tower(name: str, pool: str) -> tuple[Any, bool]:
    """The trunk, as open_clip pools it, small if timm can make it so."""
    options = {"num_classes": 0, **({"global_pool": pool} if pool else {})}
    with torch.device("meta"):
        whole = timm.create_model(name, **options)
    stem = getattr(whole, "patch_embed", None)
    try:
        if stem is None:
            return whole, False
        if hasattr(stem, "backbone"):  # convolves first: images of its own size
            return timm.create_model(name, **options, depth=2), True
        size = tuple(SIDE * side for side in stem.patch_size)
        return timm.create_model(name, **options, depth=2, img_size=size), True
    except (TypeError, ValueError, AssertionError):
        return whole, False


def outcome(name: str) -> tuple[str, str]:
    """What becomes of an architecture, and why."""
    torch.manual_seed(0)
    try:
        model, built = tower(name)
    except Exception as error:
        return "cannot be built", f"{type(error).__name__}: {error}"
    return outcome_of(model.eval(), built)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="these architectures")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    found = {}
    for name in arguments.only or open_clip.list_models():
        what, why = found[name] = outcome(name)
        print(f"{name}: {what}: {why[:200]}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    for what, count in Counter(what for what, _ in found.values()).most_common():
        print(f"{count:5d} {what}")


if __name__ == "__main__":
    main()
