"""What a training run tells while it goes on, and to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cpvit.finetune.checkpoint import Evaluation


@dataclass(frozen=True)
class StepLog:
    """One step of the optimiser, over all processes."""

    step: int
    """Steps done, this one included."""
    loss: float
    """What was minimised, mean over the images."""
    accuracy: float
    """Percent of the training images classified right, as augmented (and, if they were mixed, by one of the labels)."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """The largest of the parameter groups'."""
    images_per_s: float
    """Of all processes, training alone."""


class Observer(Protocol):
    """Is told by the main process what happens."""

    def start(self, done: int, total: int) -> None:
        """The run begins, or goes on, after ``done`` of ``total`` steps."""
        ...

    def steps(self, logs: Sequence[StepLog]) -> None:
        """These steps were done."""
        ...

    def evaluated(self, evaluation: Evaluation, *, best: bool) -> None:
        """The model was evaluated; whether it is the best so far."""
        ...

    def say(self, text: str) -> None:
        """A remark."""
        ...

    def stop(self) -> None:
        """The run has ended, well or not."""
        ...


class Silent:
    """Hears and does nothing; others build on it."""

    def start(self, done: int, total: int) -> None:
        """Nothing."""

    def steps(self, logs: Sequence[StepLog]) -> None:
        """Nothing."""

    def evaluated(self, evaluation: Evaluation, *, best: bool) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Several:
    """Passes everything on."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def start(self, done: int, total: int) -> None:
        """To everyone."""
        for observer in self._observers:
            observer.start(done, total)

    def steps(self, logs: Sequence[StepLog]) -> None:
        """To everyone."""
        for observer in self._observers:
            observer.steps(logs)

    def evaluated(self, evaluation: Evaluation, *, best: bool) -> None:
        """To everyone."""
        for observer in self._observers:
            observer.evaluated(evaluation, best=best)

    def say(self, text: str) -> None:
        """To everyone."""
        for observer in self._observers:
            observer.say(text)

    def stop(self) -> None:
        """To everyone."""
        for observer in self._observers:
            observer.stop()
