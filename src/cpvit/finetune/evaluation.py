"""Accuracy of a model over all processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from cpvit.adapters import Host
from cpvit.data import Batches
from cpvit.finetune.checkpoint import Evaluation
from cpvit.machine.processes import Processes


@torch.no_grad()
def evaluate_at(
    step: int,
    host: Host,
    batches: Batches,
    autocast: Callable[[], AbstractContextManager[Any]],
    processes: Processes,
) -> Evaluation:
    """Accuracy over the shares of all processes: every image counts once.

    Raises:
        ValueError: The images have no labels, or there are none.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    with host.in_eval_mode():
        for batch in batches:
            if batch.labels is None:
                raise ValueError(
                    "evaluation needs labels; build the loader with labels=label_map(source, classes)"
                )
            with autocast():
                logits = host.output(host.model(batch.images.to(host.device))).float().cpu()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
            loss = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
            sums += torch.tensor(
                [loss, hits[:, 0].sum(), hits.any(dim=1).sum(), len(hits)], dtype=torch.float64
            )
    loss_sum, top1, top5, images = processes.total(sums).tolist()
    if not images:
        raise ValueError("not one of the images to evaluate on could be read")
    return Evaluation(step, 100 * top1 / images, 100 * top5 / images, loss_sum / images, int(images))
