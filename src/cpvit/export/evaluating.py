"""Accuracy of an exported file, and how far it is from a dense torch model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpvit.adapters import Host
from cpvit.data import Batches
from cpvit.export.description import Description, ExportError
from cpvit.export.runtimes import ExportedModel
from cpvit.machine.environment import Environment, describe_environment
from cpvit.machine.processes import Processes, gathered
from cpvit.measure.evaluate import Progress, no_progress, predict
from cpvit.measure.metrics import Predictions, agreement, kl_divergence


@dataclass(frozen=True)
class NextToDense:
    """A dense torch model on the same images."""

    top1: float
    """Percent."""
    top5: float
    """Percent."""
    agreement: float
    """Share of the images on which the file predicts what the dense model does."""
    kl: float
    """Mean KL divergence of the file's class distribution from the dense one, in nats."""


@dataclass(frozen=True)
class ExportedEval:
    """One run of :func:`evaluate_exported`."""

    path: str
    description: Description
    top1: float
    """Percent."""
    top5: float
    """Percent."""
    images: int
    images_skipped: int
    skipped: tuple[str, ...]
    """Names of the images that could not be read."""
    dense: NextToDense | None
    environment: Environment


def evaluate_exported(
    exported: ExportedModel,
    batches: Batches,
    *,
    dense: Host | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    processes: Processes | None = None,
) -> ExportedEval:
    """Run an exported file, and a dense model if there is one, over the same labelled images.

    Args:
        exported: From :func:`cpvit.export.open_exported`.
        batches: Labelled, normalised images of the size that the file takes.
        dense: An untouched model with as many outputs.
        seed: Only recorded.
        progress: Shows how far each pass is.
        processes: Those that share the work, each with batches of its own share; the result is that of all images.

    Raises:
        ExportError: Images of another size or number than the file takes, or a dense model of other classes.
        ValueError: The images have no labels.
    """
    wanted = None
    if dense is not None:
        wanted = predict(dense, batches, title="dense", progress=progress, processes=processes)
    found = _predict(exported, batches, progress, processes)
    skipped = gathered(list(batches.skipped), processes)
    if wanted is not None and wanted.log_probs.shape != found.log_probs.shape:
        raise ExportError(
            f"{exported.path} has {found.log_probs.shape[1]} classes and the dense model {wanted.log_probs.shape[1]}; "
            "compare with the model it was exported from"
        )
    device = torch.device("cpu")
    return ExportedEval(
        path=str(exported.path),
        description=exported.description,
        top1=found.top(1),
        top5=found.top(5),
        images=len(found.log_probs),
        images_skipped=len(skipped),
        skipped=tuple(skipped),
        dense=None if wanted is None else _next_to(wanted, found),
        environment=describe_environment(device, torch.float32, seed),
    )


def _next_to(wanted: Predictions, found: Predictions) -> NextToDense:
    return NextToDense(
        top1=wanted.top(1),
        top5=wanted.top(5),
        agreement=agreement(wanted, found),
        kl=kl_divergence(wanted, found),
    )


def _predict(
    exported: ExportedModel, batches: Batches, progress: Progress, processes: Processes | None
) -> Predictions:
    log_probs, labels = [], []
    for batch in progress(batches, "exported", len(batches)):
        if batch.labels is None:
            raise ValueError(
                "evaluation needs labels; build the loader with labels=label_map(source, num_classes)"
            )
        log_probs.append(_outputs(exported, batch.images).float().log_softmax(dim=-1))
        labels.append(batch.labels)
    shares = gathered(list(zip(log_probs, labels, strict=True)), processes)
    return Predictions(torch.cat([share[0] for share in shares]), torch.cat([share[1] for share in shares]))


def _outputs(exported: ExportedModel, images: torch.Tensor) -> torch.Tensor:
    """Of any number of images; a file for a fixed batch gets its last ones filled up."""
    size = exported.description.batch_size
    if size is None or len(images) == size:
        return exported(images)
    pieces = []
    for piece in images.split(size):
        filled = piece.repeat(-(-size // len(piece)), 1, 1, 1)[:size]
        pieces.append(exported(filled)[: len(piece)])
    return torch.cat(pieces)
