"""Asking a model for what the losses need, and how good it is, over all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cpvit.adapters import Host, open_host
from cpvit.data import Batches
from cpvit.finetune.checkpoint import Evaluation
from cpvit.finetune.optimise import classifier_of
from cpvit.finetune.processes import Processes


class Answering:
    """A model that is asked for its logits and for what its classifier read."""

    def __init__(self, host: Host, called: nn.Module) -> None:
        self.called = called
        self._output = host.output
        self._classifier = classifier_of(host)

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B K] and features [B C] of images [B 3 H W]."""
        read: list[Tensor] = []
        hook = self._classifier.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        try:
            logits = self._output(self.called(images))
        finally:
            hook.remove()
        return logits, read[-1]


@torch.no_grad()
def evaluate_at(
    step: int,
    model: nn.Module,
    batches: Batches,
    autocast: Any,
    processes: Processes,
) -> Evaluation:
    """Accuracy over the shares of all processes: every image counts once.

    Raises:
        ValueError: The images have no labels.
    """
    output = open_host(model).output
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        if batch.labels is None:
            raise ValueError(
                "evaluation needs labels; build the loader with labels=label_map(source, classes)"
            )
        with autocast():
            logits = output(model(batch.images.to(processes.device))).float().cpu()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        loss = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
        sums += torch.tensor([loss, hits[:, 0].sum(), hits.any(dim=1).sum(), len(hits)], dtype=torch.float64)
    model.train(was_training)
    loss_sum, top1, top5, images = processes.total(sums).tolist()
    if not images:
        raise ValueError("not one of the images to evaluate on could be read")
    return Evaluation(step, 100 * top1 / images, 100 * top5 / images, loss_sum / images, int(images))
