"""What the page shows: a dense model, how images are prepared for it, and perhaps a plan or an exported file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpvit.adapters import Host
from cpvit.data import Preprocessing
from cpvit.demo.digits import CANVAS, load_digits_model
from cpvit.export.runtimes import ExportedModel
from cpvit.plans.check import check_plan
from cpvit.plans.plan import Plan
from cpvit.pruning.opening import open_restored

PLAN, EXPORTED = "plan", "exported file"
"""Choices next to the names of methods."""


@dataclass(frozen=True)
class Subject:
    """A model that is looked at. Checked when it is made."""

    dense: Host | None
    """The untouched model, in eval mode; None if there is an exported file alone."""
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    """Names of the classes."""
    plan: Plan | None = None
    exported: ExportedModel | None = None
    digits: bool = False
    """Whether it is the packaged model, which knows what the examples show."""

    def __post_init__(self) -> None:
        if self.dense is not None:
            _check_host(self.dense, self.classes)
        if self.plan is not None and self.dense is not None:
            check_plan(self.plan, self.dense)
        if self.exported is not None:
            _check_exported(self.exported, self.dense)
        elif self.dense is None:
            raise ValueError("there is nothing to look at: give a model or an exported file")

    @property
    def name(self) -> str:
        """Of the model."""
        if self.digits:
            return "the packaged digit model"
        if self.dense is not None:
            return self.dense.name
        assert self.exported is not None
        return self.exported.description.model

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu") if self.dense is None else self.dense.device

    def prepared(self, image: Tensor) -> Tensor:
        """Normalised images on the model's device and in its dtype."""
        return image if self.dense is None else image.to(self.dense.device, self.dense.dtype)

    def pixels(self, image: Tensor) -> Tensor:
        """A normalised image [1 3 H W] as it is drawn: [3 H W] from 0 to 1."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.preprocessing.mean, self.preprocessing.std))
        return (image[0].float().cpu() * std + mean).clamp(0, 1)


def _check_host(host: Host, classes: tuple[str, ...]) -> None:
    if len(host.image_shape) != 3:
        raise ValueError(f"{host.name} takes videos, and the page shows images; give a model of images")
    if not host.num_classes:
        raise ValueError(
            f"{host.name} has no classifier, and the page compares classes; give --num-classes and a checkpoint with "
            "a head"
        )
    if len(classes) != host.num_classes:
        raise ValueError(f"{host.name} has {host.num_classes} classes, got {len(classes)} names")


def _check_exported(exported: ExportedModel, dense: Host | None) -> None:
    described = exported.description
    if described.batch_size not in (None, 1):
        raise ValueError(
            f"{exported.path} takes {described.batch_size} images at once, and the page classifies one at a time; "
            "export it anew with --batch-size 1, or without"
        )
    if dense is None:
        return
    theirs, ours = (described.num_outputs, *described.image_size), (dense.num_classes, *dense.image_shape[1:])
    if theirs != ours:
        raise ValueError(
            f"{exported.path} has {theirs[0]} classes and takes images of {theirs[1]}x{theirs[2]}, the model "
            f"{dense.name} has {ours[0]} and takes {ours[1]}x{ours[2]}; give the model that was exported"
        )


def demo_subject(plan: Plan | None = None) -> Subject:
    """The packaged model, which knows handwritten digits."""
    preprocessing = Preprocessing((CANVAS, CANVAS), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
    return Subject(
        open_restored(load_digits_model()),
        preprocessing,
        tuple(str(digit) for digit in range(10)),
        plan,
        digits=True,
    )


def class_labels(count: int, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names, or numbers where they are not known."""
    if names is not None and len(names) == count:
        return names
    return tuple(f"class {number}" for number in range(count))
