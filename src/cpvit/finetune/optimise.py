"""Which parameters are trained, by which optimiser, at which learning rate."""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from cpvit.adapters import Host, open_host
from cpvit.finetune.config import FinetuneConfig, FreezeConfig, OptimizerConfig

_EMBEDDING = re.compile(
    r"(^|\.)(patch_embed|cls_token|dist_token|reg_token|class_token|mask_token|pos_embed|pos_embedding|pos_conv|rope|"
    r"norm_pre|conv_proj|embeddings)(\.|$)"
)
"""Parts of the names by which timm, transformers and torchvision call what comes before the first block."""

_CLASSIFIERS = ("head.fc", "head", "heads.head", "classifier", "cls_classifier")
_HEAD = re.compile(r"(^|\.)(head|head_dist|heads|classifier|cls_classifier|distillation_classifier)\.")


def classifier_of(host: Host) -> nn.Linear:
    """The linear layer that turns features into logits.

    Raises:
        ValueError: The model has none that is known.
    """
    modules = dict(host.model.named_modules())
    for name in _CLASSIFIERS:
        module = modules.get(name)
        if isinstance(module, nn.Linear):
            return module
    raise ValueError(
        f"{host.name} has no linear classifier under the names {', '.join(_CLASSIFIERS)}; create it with "
        "num_classes above 0, as a model for image classification"
    )


def freeze_(model: nn.Module, config: FreezeConfig) -> int:
    """Take parameters out of the training, in place.

    Returns:
        Number of values that stay trainable.

    Raises:
        ValueError: The model has fewer blocks, or no part of the name is known, or nothing is left to train.
    """
    host = open_host(model)
    if config.freeze_blocks > host.depth:
        raise ValueError(f"freeze_blocks is {config.freeze_blocks} but {host.name} has {host.depth} blocks")
    frozen = _frozen(host, config)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    left = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not left:
        raise ValueError(f"freeze={config.freeze!r} leaves nothing of {host.name} to train; freeze less")
    return left


def _frozen(host: Host, config: FreezeConfig) -> set[str]:
    names = {name for name, _ in host.model.named_parameters()}
    head = {name for name in names if _HEAD.search(name)}
    frozen: set[str] = set()
    if config.freeze == "embed" or config.freeze_blocks:
        frozen |= _embedding(host, names)
    if config.freeze == "all-but-head":
        frozen |= names - head
    if config.freeze == "all-but-norm-and-head":
        frozen |= names - head - _norms(host.model)
    if config.freeze.startswith("all-but") and not head:
        raise ValueError(f"{host.name} has no head to train, so freeze={config.freeze!r} would leave nothing")
    blocks = {parameter for block in host.blocks[: config.freeze_blocks] for parameter in _ids(block.module)}
    return frozen | {name for name, parameter in host.model.named_parameters() if id(parameter) in blocks}


def _ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def _embedding(host: Host, names: set[str]) -> set[str]:
    inside = {id(parameter) for block in host.blocks for parameter in block.module.parameters()}
    outside = {name for name, parameter in host.model.named_parameters() if id(parameter) not in inside}
    found = {name for name in names & outside if _EMBEDDING.search(name)}
    if not found:
        raise ValueError(f"the embedding of {host.name} is not known by name; use freeze='none'")
    return found


def _norms(model: nn.Module) -> set[str]:
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }


def drop_unused_(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Take out of the training what the answer does not depend on (a pooler, a mask token), and name it.

    Found by one backward pass in eval mode, which leaves no trace. Processes that train together would wait
    for gradients that never come.
    """
    host = open_host(model)
    was_training = model.training
    model.eval()
    parameter = next(model.parameters())
    images = torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype)
    with torch.enable_grad():
        host.output(model(images)).float().sum().backward()
    unused = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return tuple(name for name, _ in unused)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """timm's optimiser for the parameters of ``model`` that are trained.

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
