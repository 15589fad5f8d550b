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
    keys: tuple[str, ...] = ()
    """Names of the B images, where they are known."""

    def top(self, k: int) -> float:
        """Percent of images whose label is among the k most probable classes."""
        if self.labels is None:
            raise ValueError("accuracy needs labels; these images have none")
        k = min(k, self.log_probs.shape[1])
        hits = (self.log_probs.topk(k, dim=1).indices == self.labels[:, None]).any(dim=1)
        return 100 * hits.double().mean().item()


def agreement(dense: Predictions, pruned: Predictions) -> float:
    """Share of the images with the same most probable class."""
    same = dense.log_probs.argmax(dim=1) == pruned.log_probs.argmax(dim=1)
    return same.double().mean().item()


def kl_divergence(dense: Predictions, pruned: Predictions) -> float:
    """Mean over images of KL(dense || pruned), in nats."""
    return kl_divergences(dense, pruned).mean().item()


def kl_divergences(dense: Predictions, pruned: Predictions) -> Tensor:
    """KL(dense || pruned) of every image, in nats: [B], float64."""
    expected, got = dense.log_probs.double(), pruned.log_probs.double()
    return (expected.exp() * (expected - got)).sum(dim=1)


def logit_distance(dense: Predictions, pruned: Predictions) -> float:
    """Mean over images of ``|a - b|^2 / ((|a|^2 + |b|^2) / 2)``, a and b being an image's logits less their mean.

    0 for equal predictions up to a constant, 2 for unrelated ones. It orders schedules as their KL divergence on
    many images does, and needs far fewer images for it: KL comes from the few images that the dense model is
    unsure about, this from all images alike.
    """
    return logit_distances(dense, pruned).mean().item()


def logit_distances(dense: Predictions, pruned: Predictions) -> Tensor:
    """:func:`logit_distance` of every image: [B], float64."""
    expected, got = (_centred(side.log_probs.double()) for side in (dense, pruned))
    lengths = (expected.square().sum(dim=1) + got.square().sum(dim=1)) / 2
    return (expected - got).square().sum(dim=1) / lengths.clamp_min(1e-12)


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=1, keepdim=True)
