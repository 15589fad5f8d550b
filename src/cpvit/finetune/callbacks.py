"""What a training run reports while it goes on, and to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpvit.finetune.checkpoint import Evaluation


@dataclass(frozen=True)
class StepLog:
    """One step of the optimizer, over all processes."""

    step: int
    """Steps done, this one included."""
    loss: float
    """The objective, mean over the images."""
    accuracy: float
    """Percent of the training images classified right, as augmented (and, if they were mixed, by one of the labels)."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """The largest of the parameter groups'."""
    images_per_s: float
    """Of all processes, training alone."""


class Callback:
    """Called in the main process. Every method does nothing here: override those that are needed."""

    def on_start(self, done: int, total: int) -> None:
        """The run starts, or is resumed, after ``done`` of ``total`` steps."""

    def on_steps(self, logs: Sequence[StepLog]) -> None:
        """These steps are done."""

    def on_evaluation(self, evaluation: Evaluation, *, best: bool) -> None:
        """The model was evaluated; ``best`` says whether it is the best so far."""

    def on_message(self, text: str) -> None:
        """A message for the user."""

    def on_stop(self) -> None:
        """The run has ended, normally or by an error."""


class CallbackList(Callback):
    """Calls several callbacks in order."""

    def __init__(self, *callbacks: Callback) -> None:
        self._callbacks = callbacks

    def on_start(self, done: int, total: int) -> None:
        """Call each."""
        for callback in self._callbacks:
            callback.on_start(done, total)

    def on_steps(self, logs: Sequence[StepLog]) -> None:
        """Call each."""
        for callback in self._callbacks:
            callback.on_steps(logs)

    def on_evaluation(self, evaluation: Evaluation, *, best: bool) -> None:
        """Call each."""
        for callback in self._callbacks:
            callback.on_evaluation(evaluation, best=best)

    def on_message(self, text: str) -> None:
        """Call each."""
        for callback in self._callbacks:
            callback.on_message(text)

    def on_stop(self) -> None:
        """Call each."""
        for callback in self._callbacks:
            callback.on_stop()
