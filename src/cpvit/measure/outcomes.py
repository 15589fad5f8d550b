"""What happened to each image, as short as a record can hold it: intervals and paired tests are made from this."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cpvit.measure.metrics import Predictions, kl_divergences


@dataclass(frozen=True)
class Outcomes:
    """Of a pruned model, image by image, in an order that is the same for all results of a run: they can be compared in
    pairs."""

    right: str
    """A character for each image: 1 where the prediction is its label."""
    agrees: str
    """1 where the prediction is the dense model's."""
    kl_error: float
    """Standard error of the mean KL divergence over the images."""


def outcomes(dense: Predictions, pruned: Predictions) -> Outcomes:
    """Compare the predictions of a pruned model with the labels and with the dense model's.

    Raises:
        ValueError: The images have no labels.
    """
    divergences = kl_divergences(dense, pruned)
    error = divergences.std().item() / len(divergences) ** 0.5 if len(divergences) > 1 else 0.0
    return Outcomes(
        right(pruned), _digits(dense.log_probs.argmax(dim=1) == pruned.log_probs.argmax(dim=1)), error
    )


def right(predictions: Predictions) -> str:
    """A character for each image: 1 where the prediction is its label.

    Raises:
        ValueError: The images have no labels.
    """
    if predictions.labels is None:
        raise ValueError("right or wrong needs labels; these images have none")
    return _digits(predictions.log_probs.argmax(dim=1) == predictions.labels)


def _digits(flags: Tensor) -> str:
    return "".join("1" if flag else "0" for flag in flags.tolist())
