"""The training loop: steps, evaluations and checkpoints in turn.

What a step does depends on the weights, the optimizer's state and the number of the step alone: the batch, the
learning rate, the active plan and the random numbers of dropout are functions of that number. A run that is
resumed from a checkpoint is therefore the run that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpvit.adapters import Host
from cpvit.data import Batches, TrainBatch, TrainBatches
from cpvit.finetune.callbacks import Callback, StepLog
from cpvit.finetune.checkpoint import TrainingState
from cpvit.finetune.config import FinetuneConfig
from cpvit.finetune.evaluation import evaluate_at
from cpvit.finetune.features import ClassifierFeatures
from cpvit.finetune.folder import RunFolder
from cpvit.finetune.freeze import drop_unused_, freeze_
from cpvit.finetune.gradual import active, plan_at, set_patches_
from cpvit.finetune.history import History, StepMeter
from cpvit.finetune.learner import Learner
from cpvit.finetune.objective import Objective
from cpvit.finetune.precision import autocast
from cpvit.finetune.result import FinetuneResult, best_of, record_text
from cpvit.machine.device import DTYPES
from cpvit.machine.environment import describe_environment
from cpvit.machine.processes import Processes
from cpvit.plans.plan import Plan

READ_EVERY = 10
"""Steps between two readings of the losses on an accelerator, where each reading waits for it."""


class DivergedError(RuntimeError):
    """The loss or the gradient is not a finite number any more."""


@dataclass(frozen=True)
class RunSetup:
    """A run as it is set up: models opened, plan installed, nothing trained yet."""

    host: Host
    teacher: Host | None
    plan: Plan | None
    config: FinetuneConfig
    folder: RunFolder
    fingerprint: dict[str, Any]
    callback: Callback
    processes: Processes


class TrainingLoop:
    """Trains the model of a setup, from the start or from a checkpoint."""

    def __init__(self, setup: RunSetup, state: TrainingState | None) -> None:
        """Raise ValueError if the configuration does not fit the model."""
        self.setup, self.config, self.processes = setup, setup.config, setup.processes
        # A model without a known classifier is refused before anything is changed.
        teacher = None if setup.teacher is None else ClassifierFeatures(setup.teacher)
        ClassifierFeatures(setup.host)
        self.trained_values = freeze_(setup.host, self.config.freezing)
        unused = drop_unused_(setup.host)
        if unused:
            setup.callback.on_message(
                f"not trained, since the answer does not depend on them: {', '.join(unused)}"
            )
        self.learner = Learner(setup.host, self.config, self.processes)
        self.history = History()
        if state is not None:
            self.learner.restore(state)
            self.history = History.of(state)
        accelerator = self.processes.accelerator
        self.wrapped = accelerator.prepare_model(setup.host.model, device_placement=False)
        self.objective = Objective(
            ClassifierFeatures(setup.host, self.wrapped),
            teacher,
            self.config.distillation,
            self._autocast,
            setup.host.device,
        )
        self.meter = StepMeter(self.processes, self.config.batch_size * self.processes.world_size)

    def run(self, train: TrainBatches, evaluation: Batches) -> FinetuneResult:
        """All steps that remain."""
        callback, done, total = self.setup.callback, self.history.step, self.config.num_steps
        callback.on_start(done, total)
        if self.history.saved_at is not None:
            callback.on_message(f"going on after step {done} of {total}")
        try:
            self._steps(train, evaluation)
        except KeyboardInterrupt:
            callback.on_message(self._interrupted())
            raise
        finally:
            callback.on_stop()
        self._set_plan(total)
        result = self._result()
        if self.processes.is_main:
            self.setup.folder.save_record(record_text(result))
        self.processes.wait()
        return result

    def _interrupted(self) -> str:
        if self.history.saved_at is None:
            return f"interrupted after step {self.history.step}, before the first checkpoint"
        return (
            f"interrupted after step {self.history.step}; --resume goes on after step {self.history.saved_at} "
            f"({self.setup.folder.checkpoint})"
        )

    def _steps(self, train: TrainBatches, evaluation: Batches) -> None:
        history, config = self.history, self.config
        batches = train.starting_at(history.step * config.accumulation)
        read_every = 1 if self.processes.device.type == "cpu" else READ_EVERY
        self.setup.host.model.train()
        self.meter.restart()
        while history.step < config.num_steps:
            self._step(batches)
            history.step += 1
            evaluates, saves = config.evaluates_after(history.step), config.saves_after(history.step)
            if evaluates or saves or history.step % read_every == 0:
                self._read()
            best = evaluates and self._evaluate(evaluation)
            if saves or best:
                self._save()
            if evaluates or saves:
                self.meter.restart()

    def _step(self, batches: Iterator[TrainBatch]) -> None:
        """One step of the optimizer."""
        step, passes, accelerator = self.history.step, self.config.accumulation, self.processes.accelerator
        self._set_plan(step)
        rate = self.learner.set_rate(step)
        # Accelerate counts passes beyond the run, and shares their number between all Accelerators of a process.
        accelerator.step, accelerator.gradient_accumulation_steps = 0, passes
        measured = torch.zeros(2, device=self.processes.device)
        for number in range(passes):
            batch = next(batches)
            torch.manual_seed(self._seed_of(step * passes + number))
            with accelerator.accumulate(self.wrapped):
                loss, accuracy = self.objective(batch)
                self.learner.backward(loss)
            measured += torch.stack([loss.detach(), accuracy]) / passes
        norm = self.learner.update(step)
        self.meter.add(torch.cat([measured, norm.to(measured).reshape(1)]), rate)

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.processes.device, self.config.dtype)

    def _seed_of(self, micro_step: int) -> int:
        """Of the random numbers of dropout: another one for every pass, in every process."""
        return ((self.config.seed * 1_000_003 + micro_step) * 4_099 + self.processes.rank) % 2**63

    def _set_plan(self, step: int) -> None:
        if self.setup.plan is not None:
            set_patches_(self.setup.host, plan_at(self.setup.plan, self.config.tightening, step))

    def _read(self) -> None:
        """Read the losses since the last reading; stop if one is not finite."""
        logs, seconds = self.meter.read(self.history.step)
        self.history.seconds += seconds
        for log in logs:
            self._refuse_infinity(log)
        self.history.add(logs)
        self.setup.callback.on_steps(logs)
        self.meter.restart()

    def _refuse_infinity(self, log: StepLog) -> None:
        # Infinite gradients are part of float16: the loss scale is lowered and the step left out.
        if math.isfinite(log.loss) and (math.isfinite(log.grad_norm) or self.config.dtype == "float16"):
            return
        what = f"gradient's norm is {log.grad_norm}" if math.isfinite(log.loss) else f"loss is {log.loss}"
        saved = self.history.saved_at
        good = (
            "there is no checkpoint yet"
            if saved is None
            else f"the checkpoint of step {saved} is good: {self.setup.folder.checkpoint}"
        )
        raise DivergedError(
            f"the {what} at step {log.step} (learning rate {log.learning_rate:.3g}); {good}; start again with a "
            "lower learning rate, more warm-up steps or a smaller max_grad_norm"
        )

    def _evaluate(self, batches: Batches) -> bool:
        """Evaluate with the whole plan; returns whether it is the best so far, which is then kept."""
        host = self.learner.evaluated
        with active(host, self.setup.plan):
            found = evaluate_at(self.history.step, host, batches, self._autocast, self.processes)
        before = best_of(self.history.evaluations)
        self.history.evaluations += (found,)
        best = before is None or found.top1 > before.top1
        if best and self.processes.is_main:
            self._save_model(self.setup.folder.best)
        self.setup.callback.on_evaluation(found, best=best)
        return best

    def _save_model(self, folder: Path) -> None:
        host = self.learner.evaluated
        with active(host, self.setup.plan):
            self.setup.folder.save_model(host.model, folder, self.setup.plan)

    def _save(self) -> None:
        """The models first: a checkpoint that exists means that they are complete."""
        if self.processes.is_main:
            self._save_model(self.setup.folder.last)
            self.setup.folder.save_state(self._state())
            self.setup.folder.save_record(record_text(self._result()))
        self.history.saved_at = self.history.step
        self.processes.wait()

    def _state(self) -> TrainingState:
        return TrainingState(
            step=self.history.step,
            fingerprint=self.setup.fingerprint,
            plan=None if self.setup.plan is None else self.setup.plan.to_json(),
            history=self.history.tensor(),
            evaluations=self.history.evaluations,
            seconds=self.history.seconds,
            **self.learner.saved(),
        )

    def _result(self) -> FinetuneResult:
        config, history = self.config, self.history
        return FinetuneResult(
            model=self.setup.host.name,
            plan=self.setup.plan,
            config=config,
            facts=self.setup.fingerprint,
            final=history.evaluations[-1] if history.evaluations else None,
            best=best_of(history.evaluations),
            evaluations=history.evaluations,
            history=history.columns(),
            images_per_s=history.images_per_s(),
            seconds=history.seconds,
            steps_done=history.step,
            resumed_at=history.resumed_at,
            trained_values=self.trained_values,
            environment=describe_environment(self.processes.device, DTYPES[config.dtype], config.seed),
        )
