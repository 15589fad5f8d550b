"""Which parameters are trained."""

from __future__ import annotations

import re

import torch
from torch import nn

from cpvit.adapters import Host
from cpvit.finetune.config import FreezeConfig

_EMBEDDING = re.compile(
    r"(^|\.)(patch_embed|cls_token|dist_token|reg_token|class_token|mask_token|pos_embed|pos_embedding|pos_conv|rope|"
    r"norm_pre|conv_proj|embeddings)(\.|$)"
)
"""Parts of the names by which timm, transformers and torchvision call what comes before the first block."""

_HEAD = re.compile(r"(^|\.)(head|head_dist|heads|classifier|cls_classifier|distillation_classifier)\.")


def freeze_(host: Host, config: FreezeConfig) -> int:
    """Take parameters out of the training, in place.

    Returns:
        Number of values that stay trainable.

    Raises:
        ValueError: The model has fewer blocks, or no part of the name is known, or nothing is left to train.
    """
    if config.freeze_blocks > host.depth:
        raise ValueError(f"freeze_blocks is {config.freeze_blocks} but {host.name} has {host.depth} blocks")
    frozen = _frozen(host, config)
    for name, parameter in host.model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    left = sum(parameter.numel() for parameter in host.model.parameters() if parameter.requires_grad)
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


def drop_unused_(host: Host) -> tuple[str, ...]:
    """Freeze, and name, the parameters that the output does not depend on (a pooler, a mask token).

    Found by one backward pass in eval mode, which leaves no trace. Processes that train together would wait
    for gradients that never come.
    """
    model = host.model
    images = torch.zeros(1, *host.image_shape, device=host.device, dtype=host.dtype)
    with host.in_eval_mode(), torch.enable_grad():
        host.output(model(images)).float().sum().backward()
    unused = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return tuple(name for name, _ in unused)
