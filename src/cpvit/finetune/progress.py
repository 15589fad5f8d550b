"""A run in the terminal: a bar with loss, accuracy, speed and the time left; messages and evaluations above it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cpvit.finetune.callbacks import Callback, StepLog
from cpvit.finetune.checkpoint import Evaluation

LINE_EVERY = 60.0
"""Seconds between the lines that replace the bar where there is no terminal."""

_DECAY = 0.95
"""Of the running means shown: about the last twenty steps."""


class ProgressBar(Callback):
    """Draws on stderr: stdout belongs to results."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("finetune"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._means: dict[str, float] = {}
        self._total = 0
        self._last_line = time.monotonic()

    def on_start(self, done: int, total: int) -> None:
        """Show the bar."""
        self._total = total
        self._task = self._progress.add_task("finetune", total=total, completed=done, status="")
        self._progress.start()

    def on_steps(self, logs: Sequence[StepLog]) -> None:
        """Move the bar."""
        assert self._task is not None, "on_start comes first"
        for log in logs:
            for name in ("loss", "accuracy", "images_per_s"):
                value = getattr(log, name)
                self._means[name] = _DECAY * self._means.get(name, value) + (1 - _DECAY) * value
        shown = self._means
        status = (
            f"loss {shown['loss']:.3f}, acc {shown['accuracy']:.1f}%, {shown['images_per_s']:.1f} images/s"
        )
        self._progress.update(self._task, completed=logs[-1].step, status=status)
        if not self._console.is_terminal and time.monotonic() - self._last_line > LINE_EVERY:
            self._last_line = time.monotonic()
            self.on_message(f"step {logs[-1].step} of {self._total}: {status}")

    def on_evaluation(self, evaluation: Evaluation, *, best: bool) -> None:
        """A line that stays."""
        note = " (best so far)" if best else ""
        trained = f", training loss {self._means['loss']:.4f}" if self._means else ""
        self.on_message(
            f"step {evaluation.step}: top-1 {evaluation.top1:.2f}%, top-5 {evaluation.top5:.2f}%, "
            f"loss {evaluation.loss:.4f} on {evaluation.images} images{trained}{note}"
        )

    def on_message(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)

    def on_stop(self) -> None:
        """Remove the bar."""
        self._progress.stop()
