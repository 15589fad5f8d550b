"""The objective of one batch: the labels, and what a dense teacher says, with their weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpvit.data import TrainBatch
from cpvit.finetune.config import DistillationConfig
from cpvit.finetune.features import ClassifierFeatures
from cpvit.finetune.losses import classification_loss, distillation_loss, feature_loss


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    student: ClassifierFeatures
    teacher: ClassifierFeatures | None
    distillation: DistillationConfig
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device

    def __call__(self, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """(loss, share classified right) of one batch, both scalars on the device."""
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        targets = None if batch.targets is None else batch.targets.to(self.device, non_blocking=True)
        with self.autocast():
            logits, features = self.student(images)
        loss = classification_loss(logits, labels, targets)
        accuracy = (logits.detach().argmax(dim=-1) == labels).float().mean()
        return self._distilled(loss, images, logits, features), accuracy

    def _distilled(self, loss: Tensor, images: Tensor, logits: Tensor, features: Tensor) -> Tensor:
        """(1 - w) * loss + w * distillation + f * features."""
        if self.teacher is None:
            return loss
        with torch.no_grad(), self.autocast():
            wanted, wanted_features = self.teacher(images)
        weight, feature_weight = self.distillation.distill, self.distillation.distill_features
        if weight:
            follow = distillation_loss(logits, wanted, self.distillation.temperature)
            loss = (1 - weight) * loss + weight * follow
        if feature_weight:
            loss = loss + feature_weight * feature_loss(features, wanted_features)
        return loss
