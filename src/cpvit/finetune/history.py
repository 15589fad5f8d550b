"""How far a run is: steps done, what each of them measured, evaluations, time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cpvit.finetune.callbacks import StepLog
from cpvit.finetune.checkpoint import Evaluation, TrainingState
from cpvit.machine.processes import Processes

COLUMNS = tuple(column.name for column in dataclasses.fields(StepLog))[1:]
"""What is kept of every step."""


@dataclass
class History:
    """Grows with the run; a resumed run starts with that of its checkpoint."""

    step: int = 0
    """Steps done."""
    resumed_at: int = 0
    """Steps that were done already when this process began."""
    saved_at: int | None = None
    """Steps done at the last checkpoint."""
    rows: list[tuple[float, ...]] = field(default_factory=list)
    """A row per step, of COLUMNS."""
    evaluations: tuple[Evaluation, ...] = ()
    seconds: float = 0.0
    """Spent in training steps."""

    @classmethod
    def of(cls, state: TrainingState) -> History:
        """As it was at a checkpoint."""
        rows = [tuple(row) for row in state.history.tolist()]
        return cls(state.step, state.step, state.step, rows, state.evaluations, state.seconds)

    def add(self, logs: Sequence[StepLog]) -> None:
        """Keep what these steps measured."""
        self.rows += [dataclasses.astuple(log)[1:] for log in logs]

    def tensor(self) -> Tensor:
        """float64 [steps, columns]."""
        return torch.tensor(self.rows, dtype=torch.float64).reshape(len(self.rows), len(COLUMNS))

    def columns(self) -> dict[str, list[float | None]]:
        """By name; None where a value is not finite, which JSON does not know."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(COLUMNS)
        return {
            name: [value if math.isfinite(value) else None for value in column]
            for name, column in zip(COLUMNS, columns, strict=True)
        }

    def images_per_s(self) -> float:
        """Median over the steps."""
        speeds = sorted(row[COLUMNS.index("images_per_s")] for row in self.rows)
        return speeds[len(speeds) // 2] if speeds else 0.0


class StepMeter:
    """Collects loss, accuracy and gradient norm on the device, which is waited for only when they are read."""

    def __init__(self, processes: Processes, images_per_step: int) -> None:
        self._processes = processes
        self._images = images_per_step
        self._pending: list[Tensor] = []
        self._rates: list[float] = []
        self._started = time.perf_counter()

    def restart(self) -> None:
        """Leave out the time since the last reading."""
        self._started = time.perf_counter()

    def add(self, measured: Tensor, rate: float) -> None:
        """One step: loss, accuracy (share) and gradient norm as [3], and the learning rate used."""
        self._pending.append(measured)
        self._rates.append(rate)

    def read(self, done: int) -> tuple[list[StepLog], float]:
        """Means over the processes of the steps up to ``done`` that were not read yet; and the seconds they took."""
        means = self._processes.mean(torch.stack(self._pending)).cpu().double().tolist()
        seconds = time.perf_counter() - self._started
        speed = len(means) * self._images / seconds
        first = done - len(means) + 1
        logs = [
            StepLog(number, loss, 100 * accuracy, norm, rate, speed)
            for number, ((loss, accuracy, norm), rate) in enumerate(
                zip(means, self._rates, strict=True), first
            )
        ]
        self._pending, self._rates = [], []
        self.restart()
        return logs, seconds
