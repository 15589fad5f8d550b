"""``cpvit models``: what can be pruned."""

from __future__ import annotations

import json as jsonlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import torch

from cpvit.adapters import SUPPORTED, UnsupportedModelError
from cpvit.commands.common import open_named, progress, say
from cpvit.commands.tables import table
from cpvit.files import write_atomically
from cpvit.weights.create import ORIGINAL_MODELS


def run(pattern: str = "", json: Path | None = None) -> None:
    """List the model names that can be pruned, with their blocks, heads and tokens.

    Args:
        pattern: Only names that contain this, or match it as a wildcard (*deit*).
        json: Write the list to this file.
    """
    rows = _rows(pattern)
    if not rows:
        raise ValueError(f"no model that can be pruned matches {pattern!r}; supported: {SUPPORTED}")
    print(
        table(
            ["model", "family", "blocks", "heads", "tokens", "image"],
            [[str(v) for v in row.values()] for row in rows],
        )
    )
    if json is not None:
        write_atomically(json, jsonlib.dumps(rows, indent=2) + "\n")
        say(f"record: {json}")


TIMM_MODULES = ("vision_transformer", "deit", "eva", "beit", "vision_transformer_relpos")
"""timm's modules with models that the adapters know; no other model is built."""


def _rows(pattern: str) -> list[dict[str, object]]:
    wildcard = pattern if "*" in pattern else f"*{pattern}*"
    original_names = [name for name in ORIGINAL_MODELS if fnmatch(name.lower(), wildcard.lower())]
    timm_names = [name for module in TIMM_MODULES for name in timm.list_models(wildcard, module=module)]
    names = [*original_names, *sorted(set(timm_names))]
    rows = (_row(name) for name in progress(names, "models", len(names)))
    return [row for row in rows if row is not None]


def _row(name: Any) -> dict[str, object] | None:
    """One model, built without memory for its weights; None if it cannot be pruned."""
    try:
        with torch.device("meta"):
            host = open_named(name)
    except UnsupportedModelError:
        return None
    height, width = host.image_shape[1:]
    return {
        "model": name,
        "family": host.family,
        "blocks": host.depth,
        "heads": host.blocks[0].num_heads,
        "tokens": host.num_tokens,
        "image": f"{height}x{width}",
    }
