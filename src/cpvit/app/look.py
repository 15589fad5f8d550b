"""Look at one image through the dense model and a variant: answers at once, times when there is time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cpvit.app.turns import Turns
from cpvit.app.variants import Choice, Variant, Variants
from cpvit.app.watch import BlockView, watch
from cpvit.machine.timer import interleave
from cpvit.measure.metrics import Predictions, kl_divergence
from cpvit.measure.timings import Latency, Speedup, speedup_by_round, summarize
from cpvit.plans.plan import Plan

MOST_LIKELY = 5


@dataclass(frozen=True)
class Answer:
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True, eq=False)
class Side:
    """What one model says about the image."""

    title: str
    answers: tuple[Answer, ...]
    """The likeliest classes, at most five."""
    log_probs: Tensor
    """[1 K]."""
    macs: int
    blocks: tuple[BlockView, ...]
    """Empty if it cannot be watched."""
    plan: Plan | None


@dataclass(frozen=True, eq=False)
class Look:
    """One image, dense and under one choice."""

    choice: Choice
    image: Tensor
    """Normalised [1 3 H W]."""
    pixels: Tensor
    """As drawn: [3 H W] from 0 to 1."""
    grid: tuple[int, int] | None
    """Rows and columns of patches; None if they are not known (an exported file alone)."""
    dense: Side | None
    pruned: Side

    @property
    def depth(self) -> int:
        """Blocks that can be stepped through."""
        return len(self.pruned.blocks)

    @property
    def macs_ratio(self) -> float | None:
        """MACs over the dense model's."""
        return None if self.dense is None else self.pruned.macs / self.dense.macs

    @property
    def kl(self) -> float | None:
        """KL divergence of the pruned from the dense class distribution, in nats."""
        if self.dense is None:
            return None
        return kl_divergence(Predictions(self.dense.log_probs), Predictions(self.pruned.log_probs))

    @property
    def agrees(self) -> bool | None:
        """Whether the likeliest class is that of the dense model."""
        return None if self.dense is None else self.dense.answers[0].label == self.pruned.answers[0].label


@dataclass(frozen=True)
class Times:
    """Of the dense model and variants, in turn on one image, in the same rounds."""

    titles: tuple[str, ...]
    latencies: tuple[Latency, ...]
    """The dense model comes first, where there is one."""
    speedups: tuple[Speedup, ...]
    """Of the others over it; empty without a dense model."""
    rounds: int
    peaks_mib: tuple[float | None, ...]
    """Peak memory of a forward, weights included; None where it cannot be measured (another runtime)."""


class Looking:
    """What the page asks for. Safe for threads; images and results are the caller's, nothing of them is kept."""

    def __init__(self, variants: Variants, turns: Turns) -> None:
        self.variants = variants
        self.turns = turns
        self.subject = variants.subject

    def look(self, image: Tensor, choices: Sequence[Choice], before: Look | None = None) -> list[Look]:
        """Answers of the dense model and of each choice for a normalised image [1 3 H W], and the way there.

        Args:
            image: From ``Uploads``.
            choices: What to look at.
            before: An earlier look; if it was at the same image, the dense model does not run again.

        Raises:
            ValueError: A budget cannot be met, or there is no such choice.
        """
        with self.turns.answering():
            image = self.subject.prepared(image)
            dense = self._dense_side(image, before)
            sides = [(choice, self._side(self.variants.get(choice), image)) for choice in choices]
        host = self.subject.dense
        pixels, grid = self.subject.pixels(image), None if host is None else host.grid
        return [Look(choice, image, pixels, grid, dense, side) for choice, side in sides]

    def time(self, image: Tensor, choices: Sequence[Choice]) -> Times:
        """Time the dense model and each choice on an image [1 3 H W], in turn; takes as long as seven rounds.

        Raises:
            ValueError: A budget cannot be met, or there is no such choice.
            TimeoutError: Others asked for so much that nothing could be timed.
        """
        dense = self.variants.dense
        with self.turns.answering():
            image = self.subject.prepared(image)
            found = [self.variants.get(choice) for choice in choices]
            runs = found if dense is None else [dense, *found]
            peaks = tuple(variant.peak_mib for variant in runs)
        seconds = self.turns.timed(
            lambda progress: interleave(
                [lambda variant=variant: variant.answer(image) for variant in runs],  # type: ignore[misc]
                self.subject.device,
                0,
                progress,
            )
        )
        return Times(
            titles=tuple(variant.title for variant in runs),
            latencies=tuple(summarize(times) for times in seconds),
            speedups=()
            if dense is None
            else tuple(speedup_by_round(seconds[0], times) for times in seconds[1:]),
            rounds=len(seconds[0]),
            peaks_mib=peaks,
        )

    def _dense_side(self, image: Tensor, before: Look | None) -> Side | None:
        if before is not None and before.image is image:
            return before.dense
        return None if self.variants.dense is None else self._side(self.variants.dense, image)

    def _side(self, variant: Variant, image: Tensor) -> Side:
        log_probs = variant.answer(image).float().cpu().log_softmax(dim=-1)
        best = log_probs[0].exp().topk(min(MOST_LIKELY, log_probs.shape[1]))
        classes = self.subject.classes
        return Side(
            title=variant.title,
            answers=tuple(
                Answer(classes[index], probability)
                for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ),
            log_probs=log_probs,
            macs=variant.macs,
            blocks=() if variant.traced is None else watch(variant.traced, image),
            plan=variant.plan,
        )
