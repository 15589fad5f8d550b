"""How far one model's predictions are from another's, and from the truth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """What a model says about a set of images."""

    log_probs: Tensor
    """[B classes], float32."""
    labels: Tensor | None = None
    """[B]."""

    def top(self, k: int) -> float:
        """Percent of images whose label is among the k likeliest classes."""
        if self.labels is None:
            raise ValueError("accuracy needs labels; these images have none")
        k = min(k, self.log_probs.shape[1])
        hits = (self.log_probs.topk(k, dim=1).indices == self.labels[:, None]).any(dim=1)
        return 100 * hits.double().mean().item()


def agreement(dense: Predictions, pruned: Predictions) -> float:
    """Share of the images with the same likeliest class."""
    same = dense.log_probs.argmax(dim=1) == pruned.log_probs.argmax(dim=1)
    return same.double().mean().item()


def kl_divergence(dense: Predictions, pruned: Predictions) -> float:
    """Mean over images of KL(dense || pruned), in nats."""
    expected, got = dense.log_probs.double(), pruned.log_probs.double()
    return (expected.exp() * (expected - got)).sum(dim=1).mean().item()
