"""Every class of transformers that takes images: is it pruned, refused with a reason, or does it crash?

    python studies/transformers_classes.py [--json FILE]

Each class is built from its own default configuration, scaled down (two layers, 48 channels, 4 x 4 patches), or, where
that does not fit together, with two layers on the meta device, where it is only opened. One that is accepted must
reproduce its output with everything kept, run pruned, and give an image alone what it gives it in a batch. Nothing is
downloaded. Takes some five minutes on one core.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import cpvit
from cpvit.adapters import UnsupportedModelError, open_host
from cpvit.measure.support import randomize_
from cpvit.pruning.verify import verify_host

WIDTHS = {
    "hidden_size": 48,
    "embed_dim": 48,
    "d_model": 48,
    "decoder_hidden_size": 48,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "decoder_num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 12,
    "intermediate_size": 96,
    "decoder_intermediate_size": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "mlp_ratio": 2,
    "projection_dim": 16,
    "vocab_size": 64,
}
DEPTHS = [
    "num_hidden_layers",
    "num_layers",
    "depth",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "encoder_num_layers",
    "decoder_num_hidden_layers",
    "decoder_num_layers",
]
ALONE = 1e-5
"""Largest difference, of the largest output, of an image alone and in a batch."""


def classes() -> Iterator[type]:
    """Models of transformers that say they take images or videos."""
    root = Path(importlib.import_module("transformers.models").__path__[0])
    for file in sorted(root.glob("*/modeling_*.py")):
        name = f"transformers.models.{file.parent.name}.{file.stem}"
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            print(f"{name}: {error}")
            continue
        for kind in list(vars(module).values()):
            own = (
                inspect.isclass(kind)
                and issubclass(kind, transformers.PreTrainedModel)
                and kind.__module__ == name
            )
            if own and not kind.__name__.endswith("PreTrainedModel") and takes_images(kind):
                yield kind


def takes_images(kind: Any) -> bool:
    modalities = getattr(kind, "input_modalities", None) or ()
    modalities = (modalities,) if isinstance(modalities, str) else modalities
    return bool({"image", "video"} & set(modalities)) or kind.main_input_name.startswith("pixel_values")


def inner(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PreTrainedConfig):
            yield from inner(value)


def shallow(kind: Any) -> Any:
    """The default configuration with two layers."""
    try:
        config = (
            kind.config_class(num_hidden_layers=2)
            if kind.__name__.endswith("Backbone")
            else kind.config_class()
        )
    except TypeError:
        config = kind.config_class()
    for one in inner(config):
        for name in DEPTHS:
            if isinstance(vars(one).get(name), int):
                setattr(one, name, min(2, getattr(one, name)))
    return config


def narrow(kind: Any) -> Any:
    """:func:`shallow`, with few channels and patches."""
    config = shallow(kind)
    for one in inner(config):
        for name, value in WIDTHS.items():
            if isinstance(vars(one).get(name), (int, float)):
                setattr(one, name, value)
        patch, tubelet, size = (
            getattr(one, name, None) for name in ("patch_size", "tubelet_size", "image_size")
        )
        if isinstance(patch, int) and patch <= 32 and size is not None:
            one.image_size = 4 * patch if isinstance(size, int) else type(size)([4 * patch] * 2)
        if tubelet is not None:
            one.num_frames = 4
            one.image_size = 64
    return config


def outcome(kind: Any) -> tuple[str, str]:
    """What becomes of a class, and why."""
    try:
        torch.manual_seed(0)
        model, built = kind(narrow(kind)).eval(), True
    except Exception:
        try:
            with torch.device("meta"):
                model, built = kind(shallow(kind)).eval(), False
        except Exception as error:
            return "cannot be built from a default configuration", f"{type(error).__name__}: {error}"
    return outcome_of(model, built)


def outcome_of(model: Any, built: bool) -> tuple[str, str]:
    """What becomes of a model, which is only opened unless its weights are there (``built``), and why."""
    try:
        host = open_host(model)
        if not built:
            return "opened on the meta device", host.family
        randomize_(model)
        error = verify_host(host).error
        if error > 1e-5:
            return "not reproduced", f"{error:.1e}"
        cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5), dense_features=bool(host.grid_reader))
        images = torch.randn(2, *host.image_shape)
        with torch.no_grad():
            batch, alone = host.output(model(images)), host.output(model(images[1:]))
        difference = float((batch[1:] - alone).abs().max() / batch.abs().max())
        return ("pruned" if difference < ALONE else "differs alone"), f"{host.family}, error {error:.1e}"
    except UnsupportedModelError as error:
        return "refused", str(error)
    except Exception as error:
        return "CRASHED", f"{type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    found = {kind.__name__: outcome(kind) for kind in classes()}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    for name, (what, why) in found.items():
        print(f"{name}: {what}: {why[:200]}")
    for what, count in Counter(what for what, _ in found.values()).most_common():
        print(f"{count:5d} {what}")


if __name__ == "__main__":
    main()
