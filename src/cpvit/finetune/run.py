"""Finetune a model, pruned or dense: open it, prune it, train it, and keep its states in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpvit.adapters import Host
from cpvit.data import Batches, TrainBatches
from cpvit.finetune.callbacks import Callback
from cpvit.finetune.checkpoint import TrainingState
from cpvit.finetune.config import FinetuneConfig
from cpvit.finetune.features import open_on, open_teacher
from cpvit.finetune.fingerprint import refuse_differences, run_fingerprint
from cpvit.finetune.folder import RunFolder
from cpvit.finetune.loop import RunSetup, TrainingLoop
from cpvit.finetune.result import FinetuneResult
from cpvit.machine.processes import Processes, start_processes
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig
from cpvit.plans.plan import Plan
from cpvit.pruning.prune import prune_host


@dataclass(frozen=True)
class RunOptions:
    """What a run starts from, and who hears of it."""

    resume: bool = False
    """Resume from the checkpoint in the folder; start anew if it holds none, which is reported."""
    calibration: Calibration | None = None
    """For a pruning that depends on images, or corrects the projections of the heads it cuts."""
    teacher: nn.Module | None = None
    """The dense model to learn from; by default the model as it is given. Used only if the configuration asks for
    distillation."""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """What else must be the same in a resumed run, such as the names of model and data. Goes into the record."""
    callback: Callback = field(default_factory=Callback)
    """Called in the main process while the run goes on."""


def finetune(
    model: nn.Module,
    train: TrainBatches,
    evaluation: Batches,
    config: FinetuneConfig,
    output_dir: str | Path,
    *,
    pruning: PruneConfig | Plan | None,
    options: RunOptions | None = None,
    processes: Processes | None = None,
) -> FinetuneResult:
    """Finetune a model in place, and keep its best and its last state in a folder.

    Args:
        model: An untouched model with the weights to start from, in float32; moved to the device of this process.
        train: Batches of ``config.micro_batch_size`` images, for this process among ``processes``.
        evaluation: Labelled images to evaluate on, this process's share.
        config: How to train.
        output_dir: The folder of the run (:mod:`cpvit.finetune.folder`).
        pruning: What to prune; None trains the dense model.
        options: Resume, teacher, calibration, callback; by default none of them.
        processes: From ``start_processes``; by default this process and those it was started with.

    Returns:
        What was measured. The model is then pruned (or dense) and holds the weights of the last step.

    Raises:
        UnsupportedModelError: The model cannot be pruned.
        ValueError: The model, the plan and the configuration do not fit, the folder holds a run already, or
            the run in it was started differently.
        DivergedError: The loss is not finite; the last good checkpoint stays and is named.
        OSError: A checkpoint cannot be written; the one before it is untouched.

    Example:
        >>> finetune(model, train, test, FinetuneConfig(num_steps=500), "run", pruning=PruneConfig(macs=0.6))
    """
    options = options or RunOptions()
    processes = processes or start_processes()
    folder = RunFolder(Path(output_dir).expanduser())
    state = folder.load(resume=options.resume)
    host = open_on(model, processes.device)
    _check_weights(host)
    teacher = open_teacher(host, options.teacher) if config.distillation.wanted else None
    plan = _prune(host, pruning, options.calibration, config, state)
    fingerprint = run_fingerprint(host.name, config, pruning, processes.world_size, options.fingerprint)
    if state is not None:
        refuse_differences(state.fingerprint, fingerprint, folder.path)
    processes.wait()  # nobody makes files before everybody has looked
    callback = options.callback if processes.is_main else Callback()
    if processes.is_main:
        folder.prepare()
        if plan is not None:
            folder.save_plan(plan)
    if options.resume and state is None:
        callback.on_message(f"no checkpoint in {folder.path}: starting anew")
    with _random_state_kept(processes.device), _modes_kept(model):
        setup = RunSetup(host, teacher, plan, config, folder, fingerprint, callback, processes)
        return TrainingLoop(setup, state).run(train, evaluation)


def _prune(
    host: Host,
    pruning: PruneConfig | Plan | None,
    calibration: Calibration | None,
    config: FinetuneConfig,
    state: TrainingState | None,
) -> Plan | None:
    """Install the plan; that of the checkpoint if there is one. A dense run has none."""
    if state is not None and state.plan is not None:
        plan = Plan.from_json(state.plan)
        # Corrected projections come with the weights of the checkpoint.
        prune_host(host, plan.uncorrected, checkpointing=config.checkpointing)
        return plan
    if pruning is not None:
        return prune_host(host, pruning, calibration=calibration, checkpointing=config.checkpointing)
    if config.checkpointing:
        # Every family knows gradient checkpointing in its own way, the cascade in one.
        everything = PruneConfig(keep_per_block=(host.num_patches,) * host.depth)
        prune_host(host, everything, checkpointing=True)
    return None


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """The caller's random generators are afterwards in the state they were in."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    with torch.random.fork_rng(devices=[device], device_type=device.type):
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


def _check_weights(host: Host) -> None:
    dtypes = {parameter.dtype for parameter in host.model.parameters()}
    if dtypes != {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"the weights of {host.name} are {found}; give them in float32 (model.float()) and choose the dtype of "
            "the arithmetic in the configuration"
        )
