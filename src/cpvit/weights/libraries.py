"""Create models of other libraries than timm by name: Hugging Face transformers, torchvision, and saved folders.

Each gets timm's ``pretrained_cfg`` with the preprocessing that its library keeps for it, where there is one, so that
``Preprocessing.from_model`` reads them all alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL.Image import Resampling
from torch import nn

from cpvit.weights.open_clip_models import imported
from cpvit.weights.saving import MODEL, load_pruned

HF_PREFIX = "hf:"


def is_saved_folder(name: str) -> bool:
    """Whether a name is a folder that brings its own weights (``save_pruned``, or transformers' own)."""
    folder = Path(name.removeprefix(HF_PREFIX)).expanduser()
    return (folder / "config.json").is_file() or (folder / MODEL).is_file()


def open_folder(name: str) -> nn.Module:
    """The model in a folder that :func:`is_saved_folder` knows, with its weights, in eval mode."""
    folder = Path(name.removeprefix(HF_PREFIX)).expanduser()
    if (folder / MODEL).is_file():
        return load_pruned(folder)
    return create_transformers(str(folder), None, pretrained=True)


def create_transformers(source: str, num_classes: int | None, *, pretrained: bool) -> nn.Module:
    """A model of transformers from a folder or the name of a repository of the Hugging Face hub.

    Args:
        source: Without the prefix ``hf:``.
        num_classes: For a new classification head; None takes the model as it was saved.
        pretrained: Load the weights too.

    Raises:
        ImportError: transformers is not installed.
        ValueError: There is no such model.
        UnsupportedModelError: It cannot be pruned.
    """
    transformers = imported("transformers", "cpvit[hf]")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except OSError as error:
        raise ValueError(
            f"{source} is neither a folder nor a model of the Hugging Face hub: {error}"
        ) from None
    kind: Any = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    options: dict[str, object] = {}
    if num_classes is not None:
        kind = transformers.AutoModelForImageClassification
        options = {"num_labels": num_classes, "ignore_mismatched_sizes": True}
    if pretrained:
        model = kind.from_pretrained(source, **options)
    else:
        config.num_labels = config.num_labels if num_classes is None else num_classes
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    processor = _processor(transformers, source)
    if processor is not None:
        model.pretrained_cfg = _from_processor(processor)
    return _in_eval_mode(model)


def _processor(transformers: Any, source: str) -> Any:
    """The image processor that was saved with a model; None if there is none."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError):
        return None


def _from_processor(processor: Any) -> dict[str, object]:
    """timm's words for what an image processor of transformers does."""
    size = {name: int(value) for name, value in dict(processor.size).items() if value is not None}
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else size
    edge = size.get("shortest_edge", 0)
    side = int(crop.get("height") or edge), int(crop.get("width") or edge)
    return {
        "input_size": (3, *side),
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
        "interpolation": Resampling(int(processor.resample)).name.lower(),
        "crop_pct": min(side) / (edge or min(side)),
        "crop_mode": "center" if edge else "squash",
    }


def _in_eval_mode(model: Any) -> nn.Module:
    evaluated: nn.Module = model.eval()
    return evaluated


def torchvision_config(weights: Any, size: int) -> dict[str, object]:
    """timm's words for the transforms of a torchvision model's weights."""
    transforms = weights.transforms()
    side = size or transforms.crop_size[0]
    return {
        "input_size": (3, side, side),
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
        "interpolation": transforms.interpolation.value,
        "crop_pct": transforms.crop_size[0] / transforms.resize_size[0],
        "crop_mode": "center",
    }
