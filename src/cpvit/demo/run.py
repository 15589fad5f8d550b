"""The demo: prune the packaged Vision Transformer, measure it dense and pruned, draw the surviving patches."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpvit.demo.digits import GRID, cluttered_digits, load_digits_model, to_unit
from cpvit.machine.timer import interleave
from cpvit.pictures.survivors import draw_survivors
from cpvit.plans.config import PruneConfig, ScheduleName
from cpvit.plans.macs import count_macs
from cpvit.plans.plan import Plan
from cpvit.pruning.prune import prune_
from cpvit.pruning.record import record

_BATCH = 32
_DRAWN = 6
_CALIBRATION = 64
_SECONDS = 6.0


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured: the untouched model (dense) and the same weights pruned."""

    images: int
    dense_accuracy_percent: float
    pruned_accuracy_percent: float
    agreement_percent: float
    """Images that both models classify the same."""
    dense_macs: int
    """Multiply-accumulates of one image."""
    pruned_macs: int
    dense_images_per_s: float
    pruned_images_per_s: float
    plan: Plan
    picture: Path

    @property
    def speedup(self) -> float:
        """Measured images per second, pruned over dense."""
        return self.pruned_images_per_s / self.dense_images_per_s

    @property
    def macs_ratio(self) -> float:
        """MACs of the pruned model over the dense model's."""
        return self.pruned_macs / self.dense_macs


@dataclass(frozen=True)
class _Run:
    predictions: Tensor
    macs: int


def run_demo(
    output: Path = Path("cpvit-demo.png"),
    *,
    keep_rate: float = 0.5,
    schedule: ScheduleName = "auto",
    images: int | None = None,
    seed: int = 0,
) -> DemoResult:
    """Prune the packaged model, measure both on held-out cluttered digits, and write a picture.

    Args:
        output: The PNG file to write.
        keep_rate: Fraction of the patches left at the end.
        schedule: How the pruning is spread over depth; "auto" measures each block's attention range on
            64 training digits and prunes more where it is larger.
        images: How many test images to classify; None for every test digit once.
        seed: Seed of the clutter in the images.

    Example:
        >>> result = run_demo()
        >>> print(describe(result))
    """
    pictures, labels = cluttered_digits("test", count=images, seed=seed)
    calibration, _ = cluttered_digits("train", count=_CALIBRATION, seed=seed)
    model, pruned = load_digits_model(), load_digits_model()
    plan = prune_(pruned, PruneConfig(keep_rate=keep_rate, schedule=schedule), calibration=calibration)
    before, after = _run(model, pictures), _run(pruned, pictures)
    speeds = _images_per_s(model, pruned, pictures[:_BATCH])
    picture = _draw(pruned, pictures, before.predictions, labels, output)
    return DemoResult(
        images=len(labels),
        dense_accuracy_percent=_percent(before.predictions == labels),
        pruned_accuracy_percent=_percent(after.predictions == labels),
        agreement_percent=_percent(before.predictions == after.predictions),
        dense_macs=before.macs,
        pruned_macs=after.macs,
        dense_images_per_s=speeds[0],
        pruned_images_per_s=speeds[1],
        plan=plan,
        picture=picture,
    )


def describe(result: DemoResult) -> str:
    """The result as a table and a line on the schedule, for the terminal."""
    plan = result.plan
    return "\n".join(
        [
            f"{'':8}{'accuracy':>10}{'MACs/image':>13}{'images/s':>11}",
            _row("dense", result.dense_accuracy_percent, result.dense_macs, result.dense_images_per_s),
            _row("pruned", result.pruned_accuracy_percent, result.pruned_macs, result.pruned_images_per_s),
            f"{'':8}{_change(result)}",
            f"Same answer on {result.agreement_percent:.1f}% of {result.images} digits never trained on.",
            f"Schedule: {plan.schedule}; of {plan.num_patches} patches, the blocks pass on "
            f"{', '.join(str(count) for count in plan.patches_per_block)}.",
            f"Picture: {result.picture}",
        ]
    )


def _row(name: str, accuracy: float, macs: int, speed: float) -> str:
    return f"{name:8}{accuracy:>9.1f}%{macs / 1e6:>11.1f} M{speed:>11.0f}"


def _change(result: DemoResult) -> str:
    points = result.pruned_accuracy_percent - result.dense_accuracy_percent
    return f"{points:>+9.1f} {100 * (result.macs_ratio - 1):>+11.1f}%{result.speedup:>10.2f}x"


@torch.inference_mode()
def _run(model: Any, images: Tensor) -> _Run:
    predictions = torch.cat([model(part).argmax(1) for part in images.split(_BATCH)])
    return _Run(predictions, count_macs(model))


def _images_per_s(dense: Any, pruned: Any, images: Tensor) -> tuple[float, float]:
    """Median images per second of both models on one batch, timed alternately."""
    turns = interleave([lambda: dense(images), lambda: pruned(images)], images.device, _SECONDS)
    slow, fast = (statistics.median(seconds) for seconds in turns)
    return len(images) / slow, len(images) / fast


@torch.inference_mode()
def _draw(pruned: Any, images: Tensor, dense: Tensor, labels: Tensor, output: Path) -> Path:
    with record(pruned) as trace:
        after = pruned(images[:_DRAWN]).argmax(1)
    titles = [
        f"digit {label}\ndense: {before}\npruned: {now}"
        for label, before, now in zip(labels[:_DRAWN].tolist(), dense.tolist(), after.tolist(), strict=False)
    ]
    return draw_survivors(
        to_unit(images[:_DRAWN]),
        trace.survivors,
        (GRID, GRID),
        path=output,
        titles=titles,
        carriers=trace.carriers,
    )


def _percent(hits: Tensor) -> float:
    return 100 * hits.float().mean().item()
