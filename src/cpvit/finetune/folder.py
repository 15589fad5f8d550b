"""The folder of a run.

checkpoint.safetensors   everything needed to resume (:mod:`cpvit.finetune.checkpoint`)
best/, last/             the model, as ``save_pruned`` writes it; of a dense run its weights alone
plan.json                the plan, if the model is pruned
record.json              what was done and what came out, up to now
tensorboard/             curves
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from cpvit.files import os_errors, remove_leftovers, replacing, write_atomically
from cpvit.finetune.checkpoint import TrainingState, load_state, save_state
from cpvit.plans.plan import Plan
from cpvit.weights.saving import WEIGHTS, save_pruned

TENSORBOARD = "tensorboard"
"""Name of the folder with the curves."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its files."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The state to resume from."""
        return self.path / "checkpoint.safetensors"

    @property
    def best(self) -> Path:
        """The best model so far."""
        return self.path / "best"

    @property
    def last(self) -> Path:
        """The model of the last checkpoint."""
        return self.path / "last"

    @property
    def plan(self) -> Path:
        """The plan."""
        return self.path / "plan.json"

    @property
    def record(self) -> Path:
        """The record so far."""
        return self.path / "record.json"

    @property
    def tensorboard(self) -> Path:
        """The curves."""
        return self.path / TENSORBOARD

    def load(self, *, resume: bool) -> TrainingState | None:
        """The state to resume from; None if the run starts anew.

        Raises:
            ValueError: The folder holds a run and ``resume`` is not set, or the checkpoint is damaged.
        """
        if not resume:
            self._refuse_to_overwrite()
            return None
        return load_state(self.checkpoint) if self.checkpoint.is_file() else None

    def _refuse_to_overwrite(self) -> None:
        held = [
            file for file in (self.checkpoint, self.best / WEIGHTS, self.last / WEIGHTS) if file.is_file()
        ]
        if held:
            raise ValueError(
                f"{self.path} holds a run already ({held[0].relative_to(self.path)}), which would be overwritten; "
                "go on with it (--resume, RunOptions(resume=True)), or give another folder (--output-dir)"
            )

    def prepare(self) -> None:
        """Make the folder, without what a killed process has left half-written.

        Raises:
            ValueError: The path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; give the name of a folder for the run")
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (self.checkpoint, self.plan, self.record, self.best / WEIGHTS, self.last / WEIGHTS):
            remove_leftovers(file)
        for folder in (*self.best.glob(".saving-*"), *self.last.glob(".saving-*")):
            shutil.rmtree(folder)

    def save_model(self, model: nn.Module, folder: Path, plan: Plan | None) -> None:
        """Write a model into best/ or last/.

        Raises:
            OSError: It cannot be written; what was there before is untouched.
        """
        with self._explained(folder):
            if plan is not None:
                save_pruned(model, folder)
                return
            weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            with replacing(folder / WEIGHTS) as temporary:
                save_file(weights, temporary, {"format": "pt"})

    def save_state(self, state: TrainingState) -> None:
        """Write the state to resume from.

        Raises:
            OSError: It cannot be written; the old one is untouched.
        """
        with self._explained(self.checkpoint):
            save_state(self.checkpoint, state)

    def save_plan(self, plan: Plan) -> None:
        """Write the plan."""
        with self._explained(self.plan):
            write_atomically(self.plan, plan.to_json())

    def save_record(self, text: str) -> None:
        """Write the record."""
        with self._explained(self.record):
            write_atomically(self.record, text)

    @contextmanager
    def _explained(self, target: Path) -> Iterator[None]:
        """Inside, a failure to write says what could not be written and what is safe."""
        try:
            with os_errors():
                yield
        except OSError as error:
            reason = error.strerror or str(error)
            safe = (
                f"the checkpoint before it is intact ({self.checkpoint}): make room and go on with --resume"
                if self.checkpoint.is_file()
                else "there is no checkpoint yet: make room and start again"
            )
            raise OSError(f"cannot write {target}: {reason}; {safe}") from error
