"""What a run says of itself when it is done: counts, speed, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass

from cpvit.bulk.models import ModelDescription
from cpvit.bulk.stages import ADVICE, LOADING, Throughput
from cpvit.machine.environment import Environment


@dataclass(frozen=True)
class BulkResult:
    """One run."""

    command: str
    out: str
    model: ModelDescription
    images: int
    """In the source."""
    done: int
    """By this run; the others were there."""
    bad_images: int
    """Of those, that could not be read."""
    parts: int
    """Files written by this run."""
    seconds: float
    """From the first image to the last file; building the model and listing the images come before."""
    images_per_s: float
    stages: Throughput
    engine: str
    processes: int
    """That ran the model."""
    workers: int
    """That loaded images, in each of them."""
    environment: Environment


def bulk_text(result: BulkResult) -> str:
    """For the terminal."""
    head = (
        f"{result.images} images in {result.out}: {result.done} done in {result.seconds:.1f} s "
        f"({result.images_per_s:.1f} images/s), {result.parts} parts written"
    )
    bad = f"\n{result.bad_images} images could not be read; their rows say why (column error)"
    if not result.done:
        return f"{head}; nothing was missing"
    return head + (bad if result.bad_images else "") + "\n" + _stages_text(result)


def _stages_text(result: BulkResult) -> str:
    found = result.stages
    rates = ", ".join(
        f"{name} {getattr(found, name):.1f}" for name in ("reading", "decoding", "forward", "writing")
    )
    workers = f" by {result.workers} workers" if result.workers else ""
    loading = f" (reading and decoding{workers}, for each of {result.processes} processes)"
    where = loading if result.workers or result.processes > 1 else ""
    waited = f"; the model waited {found.waiting_share:.0%} of the time" if result.workers else ""
    bottleneck = f"bottleneck: {found.bottleneck}{waited}. What helps: {_advice(result)}"
    return f"images/s of each stage alone{where}: {rates}\n{bottleneck}"


def _advice(result: BulkResult) -> str:
    bottleneck = result.stages.bottleneck
    advice = ADVICE.get(bottleneck, "")
    if bottleneck not in LOADING or result.workers:
        return advice
    if result.environment.device == "cpu" and bottleneck == "decoding":
        return (
            "smaller stored images, or more processors (the model and the decoder take turns on all of them)"
        )
    return f"give --workers, so that images load while the model runs; {advice}"
