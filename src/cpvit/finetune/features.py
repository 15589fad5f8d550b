"""The models of a run, opened once each, and the logits and classifier features they give.

Legend: B images, C channels, K classes.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cpvit.adapters import Host, open_host
from cpvit.pruning.install import installed

_CLASSIFIERS = ("head.fc", "head", "heads.head", "classifier", "cls_classifier")


def open_on(model: nn.Module, device: torch.device) -> Host:
    """Move a model to the device and open it; the student, its moving average and the teacher come through here.

    Raises:
        UnsupportedModelError: The model cannot be pruned.
    """
    return open_host(model.to(device))


def open_teacher(student: Host, teacher: nn.Module | None) -> Host:
    """A frozen dense model in eval mode: the one given, or else a copy of the student before it is pruned.

    Raises:
        ValueError: The student is pruned already and no other teacher is given.
    """
    if teacher is None:
        if installed(student) is not None:
            raise ValueError("the model is pruned already; give it untouched, or give a dense teacher")
        teacher = copy.deepcopy(student.model)
    return open_on(teacher.eval().requires_grad_(False), student.device)


def classifier_of(host: Host) -> nn.Linear:
    """The linear layer that turns features into logits.

    Raises:
        ValueError: The model has none that is known.
    """
    modules = dict(host.model.named_modules())
    for name in _CLASSIFIERS:
        module = modules.get(name)
        if isinstance(module, nn.Linear):
            return module
    raise ValueError(
        f"{host.name} has no linear classifier under the names {', '.join(_CLASSIFIERS)}; create it with "
        "num_classes above 0, as a model for image classification"
    )


class ClassifierFeatures:
    """Runs a model and returns its logits together with the features its classifier reads."""

    def __init__(self, host: Host, called: nn.Module | None = None) -> None:
        """``called`` is the module to call where that is a wrapper around the model (DistributedDataParallel)."""
        self.called = host.model if called is None else called
        self._output = host.output
        self._classifier = classifier_of(host)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B K] and features [B C] of images [B 3 H W]."""
        features: list[Tensor] = []
        hook = self._classifier.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
        try:
            logits = self._output(self.called(images))
        finally:
            hook.remove()
        return logits, features[-1]
