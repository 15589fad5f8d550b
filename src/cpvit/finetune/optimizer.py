"""The optimizer and its learning rate: timm's, with the settings of the configuration."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from cpvit.finetune.config import FinetuneConfig, OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """timm's optimizer for the parameters of ``model`` that are trained.

    Raises:
        ValueError: Layer decay for a model whose layers timm does not know.
    """
    if config.layer_decay is not None and not type(model).__module__.startswith("timm."):
        raise ValueError(
            f"layer_decay needs to know the order of the layers, which timm's models tell and "
            f"{type(model).__name__} of {type(model).__module__.split('.')[0]} does not; leave it out"
        )
    layers: dict[str, Any] = {} if config.layer_decay is None else {"layer_decay": config.layer_decay}
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    found: torch.optim.Optimizer
    if config.optimizer == "adamw":
        found = create_optimizer_v2(model, opt="adamw", **common, **layers)
        return found
    # Given a model, timm leaves embeddings out of the decay; the original's SGD leaves out nothing.
    trained: Any = model if layers else [each for each in model.parameters() if each.requires_grad]
    # timm's "momentum" is SGD without Nesterov's correction.
    found = create_optimizer_v2(
        trained, opt="momentum", momentum=config.momentum, filter_bias_and_bn=False, **common, **layers
    )
    return found


def make_schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig) -> Scheduler:
    """timm's scheduler; ``step_update(s)`` sets the rate of step s, which depends on nothing but s.

    Linear from 0 in the warm-up, then half a cosine or a line down to 0 over the steps that remain, as in the
    original ViT finetuning code.
    """
    warmup = config.optimization.warmup_of(config.num_steps)
    settings: dict[str, Any] = {
        "t_initial": max(2, config.num_steps - warmup),  # where only one is left, its rate is the full one
        "warmup_t": warmup,
        "warmup_lr_init": 0.0,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if config.optimization.decay == "cosine":
        return CosineLRScheduler(optimizer, **settings)
    # A line is a polynomial of power 1, a constant one of power 0.
    return PolyLRScheduler(optimizer, power=1.0 if config.optimization.decay == "linear" else 0.0, **settings)
