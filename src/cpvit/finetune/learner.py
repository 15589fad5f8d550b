"""The student's weights and everything that updates them: optimizer, schedule, gradient scaler, moving average."""

from __future__ import annotations

import math
from typing import Any

from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor

from cpvit.adapters import Host
from cpvit.finetune.checkpoint import TrainingState
from cpvit.finetune.config import FinetuneConfig
from cpvit.finetune.features import open_on
from cpvit.finetune.optimizer import make_optimizer, make_schedule
from cpvit.finetune.precision import gradient_scaler
from cpvit.machine.processes import Processes


class Learner:
    """Sets the learning rate of a step and applies the gradients that the passes of the step have left."""

    def __init__(self, host: Host, config: FinetuneConfig, processes: Processes) -> None:
        """Raise ValueError if the configuration does not fit the model."""
        self.host = host
        self.optimizer = make_optimizer(host.model, config.optimization)
        self.schedule: Scheduler = make_schedule(self.optimizer, config)
        self.scaler = gradient_scaler(host.device, config.dtype)
        self.ema: ModelEmaV3 | None = None
        self.evaluated = host
        """The model to evaluate and save: the moving average of the weights if there is one."""
        if config.ema_decay is not None:
            self.ema = ModelEmaV3(host.model, decay=config.ema_decay, use_warmup=True)
            self.evaluated = open_on(self.ema.module, host.device)
        self._max_norm = config.optimization.max_grad_norm or math.inf
        self._accelerator = processes.accelerator

    def set_rate(self, step: int) -> float:
        """Give every parameter group its learning rate of this step; returns the largest."""
        self.schedule.step_update(step)
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one pass, divided by the number of passes in a step."""
        self._accelerator.backward(self.scaler.scale(loss))

    def update(self, step: int) -> Tensor:
        """Clip the gradients and change the weights; returns the norm before clipping, a scalar on the device."""
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm: Tensor = self._accelerator.clip_grad_norm_(parameters, self._max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.host.model, step=step + 1)
        return norm.detach()

    def saved(self) -> dict[str, Any]:
        """The part of a :class:`TrainingState` that is kept here."""
        return {
            "model": self.host.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: TrainingState) -> None:
        """Undo :meth:`saved`."""
        self.host.model.load_state_dict(state.model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state.optimizer, "param_groups": groups})
        if self.ema is not None:
            self.ema.module.load_state_dict(state.ema or {})
        self.scaler.load_state_dict(state.scaler)
