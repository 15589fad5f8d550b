"""Does a file answer as torch does? Both run on the same images."""

from __future__ import annotations

import torch
from torch import Tensor

from cpvit.export.description import ExportError, Parity
from cpvit.export.program import Deployed
from cpvit.export.runtimes import ExportedModel
from cpvit.measure.metrics import Predictions, agreement, kl_divergence, logit_distance

MOST_KL = {"float32": 1e-4, "int8": 0.25, "int8-weights": 0.1}
"""Nats allowed. int8 of a whole model is at 0.01 to 0.1 on real images; a wrong normalisation at 0.5 and above."""
MOST_DIFFERENCE = 1e-3
"""Of a typical float32 image: its largest difference over the largest output. Where rounding makes two tokens change
places in an order, single images differ more."""
BATCH = 16


@torch.inference_mode()
def compare(
    program: Deployed, exported: ExportedModel, images: Tensor, *, real: bool, most_kl: float | None
) -> Parity:
    """Run torch and the file on normalised images [B 3 H W]."""
    pairs = [
        (program(torch.from_numpy(exported.as_input(batch))).double(), exported(batch).double())
        for batch in _batches(images, exported.description.batch_size)
    ]
    expected, got = (torch.cat(side) for side in zip(*pairs, strict=True))
    if expected.shape != got.shape or not torch.isfinite(got).all():
        raise ExportError(
            f"{exported.path} answers {tuple(got.shape)}{'' if torch.isfinite(got).all() else ' with NaN'}, torch "
            f"{tuple(expected.shape)}; nothing was written"
        )
    difference = (expected - got).abs().amax(dim=1)
    scale = expected.abs().max().clamp_min(1e-12)
    wanted, answered = (Predictions(side.log_softmax(dim=1)) for side in (expected, got))
    return Parity(
        images=len(expected),
        real_images=real,
        max_difference=difference.max().item(),
        typical_difference=(difference / scale).median().item(),
        agreement=agreement(wanted, answered),
        kl=kl_divergence(wanted, answered),
        distance=logit_distance(wanted, answered),
        most_kl=MOST_KL[exported.description.precision] if most_kl is None else most_kl,
    )


def _batches(images: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """For a file of a fixed batch whole ones only; too few images for one are repeated."""
    if size is None:
        return images.split(BATCH)
    images = images.repeat(-(-size // len(images)), 1, 1, 1) if len(images) < size else images
    return images[: len(images) - len(images) % size].split(size)


def check(parity: Parity, precision: str) -> None:
    """Raise ExportError if the file does not answer as torch does."""
    exact = precision != "float32" or parity.typical_difference <= MOST_DIFFERENCE
    if exact and parity.kl <= parity.most_kl:
        return
    kind = "images" if parity.real_images else "images of noise"
    raise ExportError(
        f"the file does not answer as torch does: on {parity.images} {kind} KL {parity.kl:.4g} (at most "
        f"{parity.most_kl:g}), largest difference {parity.max_difference:.4g}, agreement {parity.agreement:.4f}; "
        "nothing was written"
    )
