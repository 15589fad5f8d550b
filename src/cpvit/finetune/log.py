"""The curves of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpvit.finetune.checkpoint import Evaluation
from cpvit.finetune.observe import Silent, StepLog


class TensorBoard(Silent):
    """Writes event files into a folder; a run that goes on replaces what came after its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def start(self, done: int, total: int) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=done + 1 if done else None)

    def steps(self, logs: Sequence[StepLog]) -> None:
        """A point on every curve of the training."""
        for log in logs:
            for name in ("loss", "accuracy", "grad_norm", "learning_rate", "images_per_s"):
                self._writer.add_scalar(f"train/{name}", getattr(log, name), log.step)

    def evaluated(self, evaluation: Evaluation, *, best: bool) -> None:
        """A point on every curve of the evaluation."""
        for name in ("top1", "top5", "loss"):
            self._writer.add_scalar(f"eval/{name}", getattr(evaluation, name), evaluation.step)
        self._writer.flush()

    def stop(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
