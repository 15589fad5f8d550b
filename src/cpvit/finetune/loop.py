"""Finetune a model, pruned or dense: the loop over steps, what it measures, and how it goes on after a stop.

What a step does depends on the weights, the optimiser's state and the number of the step alone: the batch, the
learning rate, the plan in force and the random numbers of dropout are functions of that number. A run that goes
on from a checkpoint is therefore the run that was never interrupted.

Legend: B images, K classes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from cpvit.adapters import Host, open_host
from cpvit.data import Batches, TrainBatch, TrainBatches
from cpvit.finetune.checkpoint import Evaluation, TrainingState, as_facts, differences
from cpvit.finetune.config import FinetuneConfig
from cpvit.finetune.folder import RunFolder
from cpvit.finetune.judge import Answering, evaluate_at
from cpvit.finetune.losses import classification_loss, distillation_loss, feature_loss
from cpvit.finetune.observe import Observer, Silent, StepLog
from cpvit.finetune.optimise import drop_unused_, freeze_, make_optimizer, make_schedule
from cpvit.finetune.processes import Processes, start_processes
from cpvit.finetune.result import FinetuneResult, best_of, record_text
from cpvit.finetune.tighten import in_force, plan_at, set_patches_
from cpvit.machine.device import DTYPES
from cpvit.machine.environment import describe_environment
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig
from cpvit.plans.plan import Plan
from cpvit.pruning.prune import plan_of, prune_

LOG_EVERY = 10
"""Steps between two looks at the losses on an accelerator, where each look waits for it."""

FREE = ("checkpoint_every",)
"""What may differ when a run goes on: it changes nothing that is computed."""


class DivergedError(RuntimeError):
    """The loss or the gradient is not a finite number any more."""


def finetune(
    model: nn.Module,
    train: TrainBatches,
    evaluation: Batches,
    config: FinetuneConfig,
    output_dir: str | Path,
    *,
    pruning: PruneConfig | Plan | None,
    calibration: Calibration | None = None,
    teacher: nn.Module | None = None,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
    observer: Observer | None = None,
    processes: Processes | None = None,
) -> FinetuneResult:
    """Finetune a model in place, and keep its best and its last state in a folder.

    Args:
        model: An untouched model with the weights to start from, in float32; moved to the device of this process.
        train: Batches of ``config.micro_batch_size`` images, for this process among ``processes``.
        evaluation: Labelled images to evaluate on, this process's share.
        config: How.
        output_dir: The folder of the run (:mod:`cpvit.finetune.folder`).
        pruning: What to prune; None trains the dense model.
        calibration: For a pruning that follows the images, or makes up for the heads it cuts.
        teacher: The dense model to learn from; default: the model as it is given here. Used only if the
            configuration asks for it.
        resume: Go on from the checkpoint in the folder; start anew if it holds none, which is said.
        facts: What else must be the same when the run goes on, such as the names of model and data. Goes
            into the record.
        observer: Is told what happens.
        processes: From ``start_processes``; by default this process and those it was started with.

    Returns:
        What was measured. The model is then pruned (or dense) and holds the weights of the last step.

    Raises:
        ValueError: The model, the plan and the configuration do not fit, the folder holds a run already, or
            the run in it was started differently.
        DivergedError: The loss is not finite; the last good checkpoint stays and is named.
        OSError: A checkpoint cannot be written; the one before it is untouched.

    Example:
        >>> finetune(model, train, test, FinetuneConfig(num_steps=500), "run", pruning=PruneConfig(macs=0.6))
    """
    processes = processes or start_processes()
    folder = RunFolder(Path(output_dir).expanduser())
    state = folder.found(resume=resume)
    model.to(processes.device)
    teacher = _teacher(model, teacher, config)
    plan = _prune(model, pruning, calibration, config, state)
    described = as_facts(
        {
            "model": open_host(model).name,
            **(facts or {}),
            "processes": processes.world_size,
            **_asked(config, pruning),
        }
    )
    if state is not None:
        _refuse_differences(state.facts, described, folder)
    processes.wait()  # nobody makes files before everybody has looked
    observer = observer if observer is not None and processes.is_main else Silent()
    if processes.is_main:
        folder.prepare()
        if plan is not None:
            folder.save_plan(plan)
    if resume and state is None:
        observer.say(f"no checkpoint in {folder.path}: starting anew")
    with _random_numbers_kept(processes.device), _modes_kept(model):
        run = _Run(model, plan, teacher, config, folder, described, observer, processes)
        return run.complete(train, evaluation, state)


def _teacher(model: nn.Module, teacher: nn.Module | None, config: FinetuneConfig) -> nn.Module | None:
    """A frozen dense model in eval mode, if one is wanted."""
    if not config.distillation.wanted:
        return None
    if teacher is None:
        if plan_of(model) is not None:
            raise ValueError("the model is pruned already; give it untouched, or give a dense teacher")
        teacher = copy.deepcopy(model)
    return teacher.to(next(model.parameters()).device).eval().requires_grad_(False)


def _prune(
    model: nn.Module,
    pruning: PruneConfig | Plan | None,
    calibration: Calibration | None,
    config: FinetuneConfig,
    state: TrainingState | None,
) -> Plan | None:
    """Install the plan; that of the checkpoint if there is one. A dense run has none."""
    if state is not None and state.plan is not None:
        plan = Plan.from_json(state.plan)
        prune_(
            model, plan.uncorrected, checkpointing=config.checkpointing
        )  # the weights come from the checkpoint
        return plan
    if pruning is None and not config.checkpointing:
        return None
    if pruning is None:
        # Every family knows gradient checkpointing in its own way, the cascade in one.
        host = open_host(model)
        prune_(model, PruneConfig(keep_per_block=(host.num_patches,) * host.depth), checkpointing=True)
        return None
    return prune_(model, pruning, calibration=calibration, checkpointing=config.checkpointing)


def _asked(config: FinetuneConfig, pruning: PruneConfig | Plan | None) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    for name in FREE:
        values.pop(name)
    return {"pruning": "dense" if pruning is None else dataclasses.asdict(pruning), **values}


def _refuse_differences(then: Mapping[str, Any], now: Mapping[str, Any], folder: RunFolder) -> None:
    found = differences(then, now)
    if found:
        raise ValueError(
            f"the run in {folder.path} was started differently and cannot go on like this: {'; '.join(found)}; "
            "give what it was started with, or another folder (--output-dir)"
        )


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """The caller's random numbers go on after it as if nothing had happened."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Training or eval mode, and which parameters have gradients, are afterwards as they were."""
    was_training = model.training
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        model.train(was_training)
        for parameter, wanted in trainable.items():
            parameter.requires_grad_(wanted)


class _Run:
    """The state of a run, and its steps."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | None,
        teacher: nn.Module | None,
        config: FinetuneConfig,
        folder: RunFolder,
        facts: dict[str, Any],
        observer: Observer,
        processes: Processes,
    ) -> None:
        self.config, self.plan = config, plan
        self.teacher = None if teacher is None else Answering(open_host(teacher), teacher)
        self.folder, self.facts, self.observer, self.processes = folder, facts, observer, processes
        self.model = model
        self.host = open_host(model)
        _check_weights(self.host)
        self.student = Answering(self.host, model)
        self.trained_values = freeze_(model, config.freezing)
        unused = drop_unused_(model, self.host.image_shape)
        if unused:
            observer.say(f"not trained, since the answer does not depend on them: {', '.join(unused)}")
        self.optimizer = make_optimizer(model, config.optimization)
        self.schedule: Scheduler = make_schedule(self.optimizer, config)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.dtype == "float16")
        self.ema = None
        if config.ema_decay is not None:
            self.ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
        self.stage = plan
        self.step = self.resumed_at = 0
        self.history: list[tuple[float, ...]] = []
        self.pending: list[Tensor] = []
        self.evaluations: tuple[Evaluation, ...] = ()
        self.seconds = 0.0
        self.clock = time.perf_counter()
        self.saved_at: int | None = None

    def complete(
        self, train: TrainBatches, evaluation: Batches, state: TrainingState | None
    ) -> FinetuneResult:
        """All steps that remain."""
        if state is not None:
            self._restore(state)
        self.student = Answering(self.host, self.processes.wrap(self.model))
        self.observer.start(self.step, self.config.num_steps)
        if state is not None:
            self.observer.say(f"going on after step {self.step} of {self.config.num_steps}")
        try:
            self._steps(train, evaluation)
        except KeyboardInterrupt:
            self.observer.say(self._interrupted())
            raise
        finally:
            self.observer.stop()
        self._set_plan(self.config.num_steps)
        result = self._result()
        if self.processes.is_main:
            self.folder.save_record(record_text(result))
        self.processes.wait()
        return result

    def _interrupted(self) -> str:
        if self.saved_at is None:
            return f"interrupted after step {self.step}, before the first checkpoint"
        return (
            f"interrupted after step {self.step}; --resume goes on after step {self.saved_at} "
            f"({self.folder.checkpoint})"
        )

    def _steps(self, train: TrainBatches, evaluation: Batches) -> None:
        batches = train.starting_at(self.step * self.config.accumulation)
        log_every = 1 if self.processes.device.type == "cpu" else LOG_EVERY
        self.model.train()
        self._restart_clock()
        while self.step < self.config.num_steps:
            self.pending.append(self._step(batches))
            self.step += 1
            evaluates, saves = self.config.evaluates_after(self.step), self.config.saves_after(self.step)
            if evaluates or saves or self.step % log_every == 0:
                self._look()
            best = evaluates and self._evaluate(evaluation)
            if saves or best:
                self._save()
            if evaluates or saves:
                self._restart_clock()

    def _step(self, batches: Iterator[TrainBatch]) -> Tensor:
        """One step of the optimiser: loss, accuracy (share) and norm of the gradient, as [3]."""
        self._set_plan(self.step)
        self.schedule.step_update(self.step)
        parts = self.config.accumulation
        told = torch.zeros(2, device=self.processes.device)
        for part in range(parts):
            batch = next(batches)
            torch.manual_seed(self._seed_of(self.step * parts + part))
            with self.processes.without_averaging(self.student.called, when=part < parts - 1):
                loss, accuracy = self._losses(batch)
                self.scaler.scale(loss / parts).backward()
            told += torch.stack([loss.detach(), accuracy]) / parts
        norm = self._update()
        return torch.cat([told, norm.detach().to(told).reshape(1)])

    def _update(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        limit = self.config.optimization.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step + 1)
        return norm

    def _losses(self, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """(what is minimised, share classified right) of one batch."""
        device, distillation = self.processes.device, self.config.distillation
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        targets = None if batch.targets is None else batch.targets.to(device, non_blocking=True)
        with self._autocast():
            logits, features = self.student.answer(images)
        loss = classification_loss(logits, labels, targets)
        accuracy = (logits.detach().argmax(dim=-1) == labels).float().mean()
        if self.teacher is None:
            return loss, accuracy
        with torch.no_grad(), self._autocast():
            wanted, wanted_features = self.teacher.answer(images)
        if distillation.distill:
            follow = distillation_loss(logits, wanted, distillation.temperature)
            loss = (1 - distillation.distill) * loss + distillation.distill * follow
        if distillation.distill_features:
            loss = loss + distillation.distill_features * feature_loss(features, wanted_features)
        return loss, accuracy

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES[self.config.dtype]
        return torch.autocast(self.processes.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _seed_of(self, micro_step: int) -> int:
        """Of the random numbers of dropout: another one for every pass, in every process."""
        return ((self.config.seed * 1_000_003 + micro_step) * 4_099 + self.processes.rank) % 2**63

    def _set_plan(self, step: int) -> None:
        if self.plan is None:
            return
        stage = plan_at(self.plan, self.config.tightening, step)
        if stage != self.stage:
            set_patches_(self.model, stage)
            self.stage = stage

    def _restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def _look(self) -> None:
        """Read the losses since the last look, over all processes; stop if one is not finite."""
        found = self.processes.mean(torch.stack(self.pending)).double().cpu()
        elapsed = time.perf_counter() - self.clock
        self.seconds += elapsed
        images = len(self.pending) * self.config.batch_size * self.processes.world_size
        logs = []
        for number, (loss, accuracy, norm) in enumerate(found.tolist(), self.step - len(self.pending)):
            self._refuse_infinity(number, loss, norm)
            rate = self._rate_of(number)
            logs.append(StepLog(number + 1, loss, 100 * accuracy, norm, rate, images / elapsed))
        self.history += [dataclasses.astuple(log)[1:] for log in logs]
        self.pending = []
        self.observer.steps(logs)
        self._restart_clock()

    def _rate_of(self, step: int) -> float:
        scales = [group.get("lr_scale", 1.0) for group in self.optimizer.param_groups]
        return float(max(self.schedule._get_lr(step))) * max(scales)

    def _refuse_infinity(self, step: int, loss: float, norm: float) -> None:
        # Infinite gradients are part of float16: the loss scale is lowered and the step left out.
        if math.isfinite(loss) and (math.isfinite(norm) or self.config.dtype == "float16"):
            return
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
        good = (
            "there is no checkpoint yet"
            if self.saved_at is None
            else f"the checkpoint of step {self.saved_at} is good: {self.folder.checkpoint}"
        )
        raise DivergedError(
            f"the {what} at step {step + 1} (learning rate {self._rate_of(step):.3g}); {good}; start again with a "
            "lower learning rate, more warm-up steps or a smaller max_grad_norm"
        )

    def _evaluated_model(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def _evaluate(self, batches: Batches) -> bool:
        """Evaluate with the whole plan; returns whether it is the best so far, which is then kept."""
        model = self._evaluated_model()
        with in_force(model, self.plan):
            found = evaluate_at(self.step, model, batches, self._autocast, self.processes)
        before = best_of(self.evaluations)
        self.evaluations += (found,)
        best = before is None or found.top1 > before.top1
        if best and self.processes.is_main:
            self._save_model(self.folder.best)
        self.observer.evaluated(found, best=best)
        return best

    def _save_model(self, folder: Path) -> None:
        model = self._evaluated_model()
        with in_force(model, self.plan):
            self.folder.save_model(model, folder, self.plan)

    def _save(self) -> None:
        """The models first: the state, once written, vouches for them."""
        if self.processes.is_main:
            self._save_model(self.folder.last)
            self.folder.save_state(self._state())
            self.folder.save_record(record_text(self._result()))
        self.saved_at = self.step
        self.processes.wait()

    def _state(self) -> TrainingState:
        return TrainingState(
            step=self.step,
            facts=self.facts,
            plan=None if self.plan is None else self.plan.to_json(),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict()["state"],
            history=torch.tensor(self.history, dtype=torch.float64).reshape(len(self.history), 5),
            ema=None if self.ema is None else self.ema.module.state_dict(),
            scaler=self.scaler.state_dict(),
            evaluations=self.evaluations,
            seconds=self.seconds,
        )

    def _restore(self, state: TrainingState) -> None:
        self.model.load_state_dict(state.model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state.optimizer, "param_groups": groups})
        if self.ema is not None:
            self.ema.module.load_state_dict(state.ema or {})
        self.scaler.load_state_dict(state.scaler)
        self.history = [tuple(row) for row in state.history.tolist()]
        self.evaluations, self.seconds = state.evaluations, state.seconds
        self.step = self.resumed_at = state.step
        self.saved_at = state.step

    def _result(self) -> FinetuneResult:
        names = [field.name for field in dataclasses.fields(StepLog)][1:]
        columns = list(zip(*self.history, strict=True)) or [()] * len(names)
        history = {
            name: [value if math.isfinite(value) else None for value in column]
            for name, column in zip(names, columns, strict=True)
        }
        speeds = sorted(columns[-1])
        return FinetuneResult(
            model=self.host.name,
            plan=self.plan,
            config=self.config,
            facts=self.facts,
            final=self.evaluations[-1] if self.evaluations else None,
            best=best_of(self.evaluations),
            evaluations=self.evaluations,
            history=history,
            images_per_s=speeds[len(speeds) // 2] if speeds else 0.0,
            seconds=self.seconds,
            steps_done=self.step,
            resumed_at=self.resumed_at,
            trained_values=self.trained_values,
            environment=describe_environment(
                self.processes.device, DTYPES[self.config.dtype], self.config.seed
            ),
        )


def _check_weights(host: Host) -> None:
    dtypes = {parameter.dtype for parameter in host.model.parameters()}
    if dtypes != {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"the weights of {host.name} are {found}; give them in float32 (model.float()) and choose the dtype of "
            "the arithmetic in the configuration"
        )
