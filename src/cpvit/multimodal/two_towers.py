"""Models with an image tower and a text tower: images are classified by the names of the classes (zero-shot).

The image tower is opened as any model is. Its output becomes the scaled cosine between the image and the text of each
class, so everything that works on classifiers works on it: plans, calibration, evaluation.

Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.

Legend: B images, T texts, K classes, C features that the towers share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpvit.adapters import Host, UnsupportedModelError, open_host
from cpvit.weights.libraries import HF_PREFIX, create_transformers
from cpvit.weights.open_clip_models import OPEN_CLIP_PREFIX, create_open_clip_towers

TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven that OpenAI's notebook on prompts for ImageNet found best together."""

BATCH = 64
"""Texts per forward."""

SAME = 1e-6
"""Texts of the same tokens differ by rounding alone."""


@dataclass(frozen=True)
class TwoTowers:
    """A two-tower model, opened."""

    host: Host
    """The image tower; its output is the image's features [B C]."""
    embed: Callable[[Sequence[str]], Tensor]
    """Texts -> their features [T C]."""
    scale: float
    """What the cosine is multiplied with."""


def open_two_towers(name: str, *, pretrained: bool = False, checkpoint: Path | None = None) -> TwoTowers:
    """A two-tower model by name, on the CPU, in eval mode, with the tokenizer that belongs to it.

    Args:
        name: ``open_clip:ARCHITECTURE`` or ``open_clip:ARCHITECTURE:TAG``, or ``hf:FOLDER_OR_ID`` of a model of
            transformers (CLIP, SigLIP ...) that was saved with its tokenizer.
        pretrained: Download the weights.
        checkpoint: open_clip's weights in a file.

    Raises:
        ValueError: The name is of neither kind, or there are no weights, or no tokenizer.
        UnsupportedModelError: The image tower cannot be pruned, or there is no text tower.
    """
    parts = _take_apart(name, pretrained, checkpoint)
    return _finished(parts, open_host(parts.eye))


class _Parts(NamedTuple):
    """A two-tower model taken apart."""

    model: Any
    eye: nn.Module
    """The image tower."""
    projection: nn.Module | None
    """What its output goes through, if it is not part of the tower."""
    embed: Callable[[Sequence[str]], Tensor]


def _take_apart(name: str, pretrained: bool, checkpoint: Path | None) -> _Parts:
    if name.startswith(OPEN_CLIP_PREFIX):
        if checkpoint is None and not pretrained:
            raise ValueError(
                f"random weights know no words: give --checkpoint FILE, or --pretrained, for {name}"
            )
        weights = None if checkpoint is None else str(checkpoint)
        return _open_clip(name.removeprefix(OPEN_CLIP_PREFIX), pretrained=pretrained, weights=weights)
    source = name.removeprefix(HF_PREFIX)
    if not name.startswith(HF_PREFIX) and not (Path(source).expanduser() / "config.json").is_file():
        raise ValueError(
            f"{name} has no text tower that cpvit knows; zero-shot classification takes {OPEN_CLIP_PREFIX}ARCHITECTURE "
            f"or {HF_PREFIX}FOLDER_OR_ID of a model such as CLIP or SigLIP"
        )
    if checkpoint is not None:
        raise ValueError(f"{name} brings its weights; leave out --checkpoint")
    return _transformers(source)


def _open_clip(name: str, *, pretrained: bool, weights: str | None) -> _Parts:
    import open_clip

    model, eye = create_open_clip_towers(name, pretrained=pretrained, weights=weights)
    tokenizer = open_clip.get_tokenizer(name.partition(":")[0])
    projection = None if eye is model.visual else model.visual.head

    def embed(texts: Sequence[str]) -> Tensor:
        device = next(model.parameters()).device
        features: Tensor = model.encode_text(tokenizer(list(texts)).to(device))
        return features

    return _Parts(model, eye, projection, embed)


def _transformers(source: str) -> _Parts:
    from transformers import AutoTokenizer

    model: Any = create_transformers(source, None, pretrained=True)
    if not all(hasattr(model, part) for part in ("vision_model", "get_text_features", "logit_scale")):
        raise UnsupportedModelError(
            f"{type(model).__name__} in {source} has no text tower (no get_text_features and logit_scale); "
            "zero-shot classification takes models such as CLIPModel or SiglipModel"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} holds no tokenizer ({str(error).partition(chr(10))[0]}); save it beside the model: "
            "tokenizer.save_pretrained(folder)"
        ) from error
    longest = model.config.text_config.max_position_embeddings
    reads_all = model.config.model_type.startswith("siglip")

    def embed(texts: Sequence[str]) -> Tensor:
        # To the full length, which SigLIP was trained with, and reads without a mask; the others mask the rest.
        words = tokenizer(
            list(texts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        )
        names = ("input_ids",) if reads_all else ("input_ids", "attention_mask")
        given = {key: words[key].to(model.device) for key in names if key in words}
        features: Tensor = model.get_text_features(**given).pooler_output
        return features

    eye = model.vision_model
    vars(eye)["pretrained_cfg"] = getattr(model, "pretrained_cfg", None)
    return _Parts(model, eye, getattr(model, "visual_projection", None), embed)


def _finished(parts: _Parts, host: Host) -> TwoTowers:
    """Nothing reads the patches that leave the tower but its own pooling."""
    features = host.output if parts.projection is None else _Projected(host.output, parts.projection)
    host = replace(host, output=features, discards_patches=not host.pools_patches)
    return TwoTowers(host, parts.embed, scale=float(parts.model.logit_scale.detach().exp()))


@dataclass(frozen=True)
class _Projected:
    """The output of a tower, projected to the features that the towers share."""

    inner: Callable[[Any], Tensor]
    projection: nn.Module

    def __call__(self, result: Any) -> Tensor:
        """What the tower returns -> [B C]."""
        pooled = self.inner(result)
        # As the tokens are: a check runs a half-precision tower in float32, and the tower may be moved elsewhere.
        weights = {key: value.to(pooled) for key, value in self.projection.state_dict().items()}
        projected: Tensor = torch.func.functional_call(self.projection, weights, (pooled,))
        return projected


@torch.inference_mode()
def class_features(towers: TwoTowers, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """The normalised mean of the normalised features of a class name in all templates: [K C].

    Raises:
        ValueError: No classes, or a template without a place for the name, or classes with the same features.
    """
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(
            f"zero-shot classification takes two or more class names, each once, got {len(classes)} "
            f"({len(set(classes))} different)"
        )
    without = [template for template in templates if "{}" not in template]
    if without or not templates:
        raise ValueError(f"a template holds {{}} where the class name goes, got {without or 'no templates'}")
    texts = [template.replace("{}", name) for name in classes for template in templates]
    parts = [towers.embed(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    features = F.normalize(torch.cat(parts).float(), dim=-1).unflatten(0, (len(classes), len(templates)))
    features = F.normalize(features.mean(dim=1), dim=-1)
    _check_apart(features, classes)
    return features


def _check_apart(features: Tensor, classes: Sequence[str]) -> None:
    """Raise ValueError if classes have the same features: for a missing tokenizer transformers makes an empty one."""
    alike = ((features @ features.T).fill_diagonal_(-1) > 1 - SAME).nonzero()
    if len(alike):
        one, other = (classes[int(row)] for row in alike[0])
        raise ValueError(
            f"{one!r} and {other!r} are the same to the text tower: its tokenizer knows none of their words; is it the "
            "one that belongs to the model (tokenizer.save_pretrained(folder))?"
        )


@dataclass(frozen=True)
class ZeroShotLogits:
    """The logits of an image: scaled cosines between its features and those of the classes."""

    inner: Callable[[Any], Tensor]
    classes: Tensor
    """[K C], normalised."""
    scale: float

    def __call__(self, result: Any) -> Tensor:
        """What the tower returns -> [B K]."""
        features = F.normalize(self.inner(result), dim=-1)
        return self.scale * features @ self.classes.to(features).T


def zero_shot_classifier(
    towers: TwoTowers, classes: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Host:
    """The image tower as a classifier of K classes, known by their names.

    Raises:
        ValueError: No classes, or a template without a place for the name.
    """
    features = class_features(towers, classes, templates).clone()  # no tensor of inference mode
    host = towers.host
    return replace(host, output=ZeroShotLogits(host.output, features, towers.scale), num_classes=len(classes))


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, without empty ones.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; give a text file with a class name, or template, per line"
        )
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
