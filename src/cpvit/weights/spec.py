"""How to build a model again: which library made it, under which name, with which arguments.

A model does not carry its arguments with it, so they are read off, and then proven: a model is built from them
(on the meta device, which computes nothing), pruned by the same plan, and compared module by module. A recipe
that does not give the same model is never returned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from cpvit.adapters import Host
from cpvit.adapters.hf import MODELS as TRANSFORMERS_MODELS
from cpvit.plans.plan import Plan
from cpvit.pruning.prune import prune_


class RecipeError(ValueError):
    """How the model was built could not be found out; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """How to build an untouched model with fresh weights. Readable JSON."""

    library: str
    """timm, torchvision or transformers."""
    name: str
    """timm's name of the architecture, or the class."""
    arguments: dict[str, Any]
    """Of ``timm.create_model``, of the class, or the values of the configuration (transformers)."""
    preprocessing: dict[str, Any]
    """What timm says about the images the model was trained on; empty for the others."""


def find_recipe(host: Host, plan: Plan, arguments: Mapping[str, object] | None = None) -> Recipe:
    """Read off how a pruned model was built, and prove it.

    Args:
        host: Pruned by ``plan``.
        plan: The plan in force.
        arguments: What it was created with, where that cannot be read off.

    Raises:
        RecipeError: It cannot be found out.
    """
    found = _read(host, plan)
    recipe = replace(found, arguments={**found.arguments, **_plain(arguments or {})})
    try:
        with torch.device("meta"):
            twin = build(recipe)
        prune_(twin, plan.uncorrected, verify=False)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise RecipeError(f"{recipe.name} cannot be built anew: {error}") from error
    difference = first_difference(host.model, twin)
    if difference is not None:
        raise RecipeError(f"{recipe.name} built anew is another model: {difference}")
    return recipe


def build(recipe: Recipe) -> nn.Module:
    """The untouched model with fresh weights, in eval mode.

    Raises:
        ValueError: A recipe of an unknown library or class.
        ImportError: The library is not installed.
    """
    builders: dict[str, Callable[[Recipe], nn.Module]] = {
        "timm": _build_timm,
        "torchvision": _build_torchvision,
        "transformers": _build_transformers,
    }
    if recipe.library not in builders:
        raise ValueError(f"library must be one of {', '.join(builders)}, got {recipe.library!r}")
    return builders[recipe.library](recipe).eval()


def _read(host: Host, plan: Plan) -> Recipe:
    kind = type(host.model)
    if kind.__module__.startswith("timm."):
        return _read_timm(host, plan)
    if kind is TorchvisionViT:
        return _read_torchvision(host, plan)
    if kind.__module__.startswith("transformers."):
        return _read_transformers(host.model)
    raise RecipeError(
        f"{kind.__qualname__} of {kind.__module__} comes from none of the libraries cpvit knows"
    )


PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
"""What is kept of timm's pretrained configuration."""


def _read_timm(host: Host, plan: Plan) -> Recipe:
    model: Any = host.model
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise RecipeError(f"this {type(model).__name__} was not created by timm.create_model and has no name")
    channels, height, width = host.image_shape
    patch_height, patch_width = (
        side // count for side, count in zip((height, width), host.grid, strict=True)
    )
    arguments: dict[str, Any] = {
        "img_size": [height, width],
        "patch_size": patch_height if patch_height == patch_width else [patch_height, patch_width],
        "in_chans": channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": host.depth,
        "num_heads": plan.num_heads[0],
    }
    if rate := max(
        (module.drop_prob for module in model.modules() if isinstance(module, DropPath)), default=0
    ):
        arguments["drop_path_rate"] = rate  # the deepest block's
    kept = {key: model.pretrained_cfg[key] for key in PREPROCESSING if key in model.pretrained_cfg}
    return Recipe("timm", name, _plain(arguments), _plain(kept))


def _build_timm(recipe: Recipe) -> nn.Module:
    model: Any = timm.create_model(recipe.name, pretrained=False, **_tuples(recipe.arguments))
    model.pretrained_cfg.update(_tuples(recipe.preprocessing))
    return model


def _read_torchvision(host: Host, plan: Plan) -> Recipe:
    model: Any = host.model
    read_off = (
        "image_size",
        "patch_size",
        "hidden_dim",
        "mlp_dim",
        "dropout",
        "attention_dropout",
        "num_classes",
        "representation_size",
    )
    arguments = {name: getattr(model, name) for name in read_off}
    arguments |= {"num_layers": host.depth, "num_heads": plan.num_heads[0]}
    return Recipe("torchvision", "VisionTransformer", _plain(arguments), {})


def _build_torchvision(recipe: Recipe) -> nn.Module:
    model: nn.Module = TorchvisionViT(**recipe.arguments)
    return model


def _read_transformers(model: Any) -> Recipe:
    values = json.loads(model.config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)  # where it was loaded from is nobody's business
    return Recipe("transformers", type(model).__name__, values, {})


def _build_transformers(recipe: Recipe) -> nn.Module:
    if recipe.name not in TRANSFORMERS_MODELS:
        raise ValueError(f"{recipe.name} is not a class of transformers that cpvit knows")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"a {recipe.name} is built by transformers, which is not installed: pip install 'cpvit[hf]'"
        ) from error
    kind: Any = getattr(transformers, recipe.name)
    # The reader changes the dictionary it is given.
    model: nn.Module = kind(kind.config_class.from_dict(dict(recipe.arguments)))
    return model


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As it will come back from JSON.

    Raises:
        RecipeError: A value has no place in JSON.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain
    except TypeError as error:
        raise RecipeError(f"an argument cannot be written down: {error}") from error


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


# What a forward in eval mode, through the cascade, does not depend on.
_IGNORED = (
    "training",
    "cut_heads",
    "heads_lost",
    "fused_attn",
    "grad_checkpointing",
    "gradient_checkpointing",
    "name_or_path",
)


def first_difference(one: nn.Module, other: nn.Module) -> str | None:
    """The first module, setting or tensor shape in which two models differ; None if they are built alike."""
    left, right = dict(_parts(one)), dict(_parts(other))
    for name in (*left, *right):
        if left.get(name) != right.get(name):
            return f"{name} is {left.get(name, 'missing')}, not {right.get(name, 'missing')}"
    return None


def _parts(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Every module's class and plain settings, every tensor's shape."""
    for path, module in model.named_modules():
        place = path or "the model"
        yield f"{place} (class)", f"{type(module).__module__}.{type(module).__qualname__}"
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in _IGNORED and _is_plain(value):
                yield f"{place}.{name}", value
    for name, tensor in model.state_dict().items():
        yield f"{name} (shape)", tuple(tensor.shape)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
