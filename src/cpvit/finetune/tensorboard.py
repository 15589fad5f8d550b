"""The curves of a run for TensorBoard, written by Accelerate's tracker."""

from __future__ import annotations

from collections.abc import Sequence

from cpvit.finetune.callbacks import Callback, StepLog
from cpvit.finetune.checkpoint import Evaluation
from cpvit.finetune.folder import TENSORBOARD
from cpvit.machine.processes import Processes


class TensorBoard(Callback):
    """Writes event files into the run's folder; a resumed run replaces the points after its checkpoint.

    The folder is the ``logging_dir`` that ``start_processes`` was given.
    """

    def __init__(self, processes: Processes) -> None:
        """Raise ValueError if the processes were started without a ``logging_dir``."""
        if not processes.accelerator.log_with:
            raise ValueError(
                "TensorBoard has nowhere to write: start the processes with "
                "start_processes(logging_dir=...), the folder of the run"
            )
        self._accelerator = processes.accelerator

    def on_start(self, done: int, total: int) -> None:
        """Open the event file."""
        options = {"purge_step": done + 1 if done else None}
        self._accelerator.init_trackers(TENSORBOARD, init_kwargs={"tensorboard": options})

    def on_steps(self, logs: Sequence[StepLog]) -> None:
        """A point on every training curve."""
        for log in logs:
            names = ("loss", "accuracy", "grad_norm", "learning_rate", "images_per_s")
            self._accelerator.log({f"train/{name}": getattr(log, name) for name in names}, step=log.step)

    def on_evaluation(self, evaluation: Evaluation, *, best: bool) -> None:
        """A point on every evaluation curve."""
        values = {f"eval/{name}": getattr(evaluation, name) for name in ("top1", "top5", "loss")}
        self._accelerator.log(values, step=evaluation.step)

    def on_stop(self) -> None:
        """Close the event file."""
        # Not end_training(), which also leaves the process group: the others may still be at work.
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers.clear()
