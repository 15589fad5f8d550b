"""The losses: against the labels, and the distance of the student from a dense teacher.

Legend: B images, K classes, C channels.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def classification_loss(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Mean cross-entropy of logits [B K] with labels [B], or with soft targets [B K] (mixed, smoothed) if any."""
    return F.cross_entropy(logits.float(), labels if targets is None else targets)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over images of T^2 KL(teacher || student) of the distributions softened by T, from logits [B K].

    Hinton et al., arXiv 1503.02531; T^2 keeps the size of the gradient independent of T.
    """
    wanted = F.log_softmax(teacher.float() / temperature, dim=-1)
    got = F.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(got, wanted, reduction="batchmean", log_target=True)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images of the squared distance of features [B C], in units of the teacher's squared length.

    Relative, so that one weight suits models whose features differ in scale.
    """
    student, teacher = student.float(), teacher.float()
    distance = (student - teacher).square().sum(dim=-1)
    return (distance / teacher.square().sum(dim=-1).clamp_min(1e-12)).mean()
