"""Model specs: the library, the name and the arguments from which a model can be built again.

The arguments are inferred from the model and then checked: a model is built from them on the meta device,
pruned by the same plan, and compared with the original module by module. A model spec that does not give the
same model is never returned. timm records the arguments of ``create_model`` only in recent versions (not in
1.0.15), in a private attribute, and without later changes such as removed blocks; so they are inferred here.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.layers import DropPath, HybridEmbed
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from cpvit.adapters import Host
from cpvit.adapters.hf_tower import sees_images
from cpvit.plans.plan import Plan
from cpvit.pruning.prune import prune_
from cpvit.weights.open_clip_models import create_open_clip_towers


class ModelSpecError(ValueError):
    """No model spec could be inferred; the message says why."""


@dataclass(frozen=True)
class ModelSpec:
    """How to build an untouched model with fresh weights. Readable JSON."""

    library: str
    """timm, torchvision, transformers or open_clip."""
    name: str
    """timm's architecture name, or the class (of transformers behind its module, if it is not exported)."""
    arguments: dict[str, Any]
    """Of ``timm.create_model``, of the class (torchvision), or of the configuration (transformers)."""
    preprocessing: dict[str, Any]
    """The image preprocessing of the model in timm's words; empty if it is not known."""


def infer_model_spec(host: Host, plan: Plan, arguments: Mapping[str, object] | None = None) -> ModelSpec:
    """Infer the model spec of a pruned model, and check it.

    Args:
        host: Pruned by ``plan``.
        plan: The active plan.
        arguments: What it was created with, where that cannot be inferred.

    Raises:
        ModelSpecError: It cannot be inferred.
    """
    inferred = _infer(host, plan, arguments or {})
    spec = replace(inferred, arguments={**inferred.arguments, **_plain(arguments or {})})
    try:
        with torch.device("meta"):
            twin = build(spec)
        prune_(twin, plan.uncorrected, verify=False)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelSpecError(f"{spec.name} cannot be built anew: {error}") from error
    difference = first_difference(host.model, twin)
    if difference is not None:
        raise ModelSpecError(f"{spec.name} built anew is another model: {difference}")
    return spec


def build(spec: ModelSpec) -> nn.Module:
    """The untouched model with fresh weights, in eval mode.

    Raises:
        ValueError: A model spec of an unknown library or class, or one that would load more than code that is here.
        ImportError: The library is not installed.
    """
    builders: dict[str, Callable[[ModelSpec], nn.Module]] = {
        "timm": _build_timm,
        "torchvision": _build_torchvision,
        "transformers": _build_transformers,
        "open_clip": _build_open_clip,
    }
    if spec.library not in builders:
        raise ValueError(f"library must be one of {', '.join(builders)}, got {spec.library!r}")
    model = builders[spec.library](spec).eval()
    if spec.preprocessing and spec.library != "timm":
        vars(model)["pretrained_cfg"] = _tuples(spec.preprocessing)
    return model


def _infer(host: Host, plan: Plan, arguments: Mapping[str, object]) -> ModelSpec:
    kind = type(host.model)
    if kind.__module__.startswith("timm."):
        return _infer_timm(host, plan)
    if kind is TorchvisionViT:
        return _infer_torchvision(host, plan)
    if kind.__module__.startswith("transformers."):
        return _infer_transformers(host.model)
    if kind.__module__.startswith("open_clip."):
        return _infer_open_clip(host.model, arguments)
    raise ModelSpecError(
        f"{kind.__qualname__} of {kind.__module__} comes from none of the libraries cpvit knows"
    )


PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
"""Keys of timm's ``pretrained_cfg`` that are saved."""


def _infer_timm(host: Host, plan: Plan) -> ModelSpec:
    model: Any = host.model
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise ModelSpecError(
            f"this {type(model).__name__} was not created by timm.create_model and has no name"
        )
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
    if isinstance(getattr(model, "patch_embed", None), HybridEmbed):
        del arguments["patch_size"]  # that of its patches on the image; timm asks for the one on its features
    if rate := max(
        (module.drop_prob for module in model.modules() if isinstance(module, DropPath)), default=0
    ):
        arguments["drop_path_rate"] = rate  # the deepest block's
    return ModelSpec("timm", name, _plain(arguments), _preprocessing(model))


def _preprocessing(model: Any) -> dict[str, Any]:
    """What is saved of a model's ``pretrained_cfg``."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return _plain({key: config[key] for key in PREPROCESSING if key in config})


_LOADING = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of ``timm.create_model`` that have it open files or the network."""


def _build_timm(spec: ModelSpec) -> nn.Module:
    # A folder may come from anybody: the names of the hub, and what loads weights, would reach beyond it.
    if not timm.is_model(spec.name):
        raise ValueError(f"{spec.name!r} is not an architecture of timm")
    if loading := [name for name in _LOADING if name in spec.arguments]:
        raise ValueError(f"{loading[0]} is no argument of the architecture {spec.name}; leave it out")
    model: Any = timm.create_model(spec.name, pretrained=False, **_tuples(spec.arguments))
    model.pretrained_cfg.update(_tuples(spec.preprocessing))
    return model


def _infer_torchvision(host: Host, plan: Plan) -> ModelSpec:
    model: Any = host.model
    names = (
        "image_size",
        "patch_size",
        "hidden_dim",
        "mlp_dim",
        "dropout",
        "attention_dropout",
        "num_classes",
        "representation_size",
    )
    arguments = {name: getattr(model, name) for name in names}
    arguments |= {"num_layers": host.depth, "num_heads": plan.num_heads[0]}
    return ModelSpec("torchvision", "VisionTransformer", _plain(arguments), _preprocessing(model))


def _build_torchvision(spec: ModelSpec) -> nn.Module:
    model: nn.Module = TorchvisionViT(**spec.arguments)
    return model


_TRANSFORMERS_MODELS = "transformers.models."
"""Where a class that transformers does not export is looked for, by module and name."""


def _infer_transformers(model: Any) -> ModelSpec:
    values = json.loads(model.config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)  # a local path, which is private
    kind = type(model)
    inner = kind.__module__.removeprefix(_TRANSFORMERS_MODELS)
    exported = getattr(sys.modules["transformers"], kind.__name__, None) is kind
    return ModelSpec(
        "transformers",
        kind.__name__ if exported else f"{inner}.{kind.__name__}",
        values,
        _preprocessing(model),
    )


def _build_transformers(spec: ModelSpec) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"a {spec.name} is built by transformers, which is not installed: pip install 'cpvit[hf]'"
        ) from error
    module, _, name = spec.name.rpartition(".")
    owner = importlib.import_module(_TRANSFORMERS_MODELS + module) if module else transformers
    kind: Any = getattr(owner, name, None)
    if not _is_image_model(kind, transformers.PreTrainedModel):
        raise ValueError(f"{spec.name} is not a class of transformers that cpvit knows")
    if remote := _remote_code(spec.arguments):
        raise ValueError(
            f"the configuration of {spec.name} asks for code of the hub ({remote}); take that out"
        )
    # from_dict changes its argument.
    model: nn.Module = kind(kind.config_class.from_dict(dict(spec.arguments)))
    return model


def _remote_code(values: object) -> str | None:
    """The first entry of a configuration that names a kernel of the hub, which transformers would download."""
    if not isinstance(values, Mapping):
        return None
    for name, value in values.items():
        if str(name).endswith("_implementation") and "/" in str(value):
            return f"{name}={value!r}"
        if (found := _remote_code(value)) is not None:
            return found
    return None


def _is_image_model(kind: Any, base: type) -> bool:
    return inspect.isclass(kind) and issubclass(kind, base) and sees_images(kind)


def _infer_open_clip(model: Any, arguments: Mapping[str, object]) -> ModelSpec:
    name = arguments.get("architecture") or (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise ModelSpecError(
            f"this {type(model).__name__} of open_clip has no name; give it: save_pruned(..., arguments="
            '{"architecture": "ViT-B-32"})'
        )
    return ModelSpec("open_clip", str(name), {"towers": hasattr(model, "visual")}, _preprocessing(model))


def _build_open_clip(spec: ModelSpec) -> nn.Module:
    towers, eye = create_open_clip_towers(spec.name, pretrained=False)
    model: nn.Module = towers if spec.arguments.get("towers") else eye
    return model


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they come back from JSON.

    Raises:
        ModelSpecError: A value cannot be written as JSON.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain
    except TypeError as error:
        raise ModelSpecError(f"an argument cannot be written down: {error}") from error


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


# Attributes that do not change the pruned forward in eval mode.
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
                yield f"{place}.{name}", _tupled(value)
    for name, tensor in model.state_dict().items():
        yield f"{name} (shape)", tuple(tensor.shape)


def _tupled(value: object) -> object:
    """Lists as tuples: JSON does not tell them apart."""
    return tuple(_tupled(item) for item in value) if isinstance(value, (tuple, list)) else value


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
