"""The program to export: the model with its output picked and, if asked for, its normalisation inside."""

from __future__ import annotations

import copy
import warnings
from hashlib import sha256

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cpvit.adapters import Host
from cpvit.data import Preprocessing

MOST_IMAGES = 1 << 16
"""In one batch."""


class Deployed(nn.Module):
    """Images to logits. With a preprocessing, [B H W 3] uint8 RGB; else what the model takes, [B 3 H W]."""

    scale: Tensor
    offset: Tensor

    def __init__(self, host: Host, normalization: Preprocessing | None) -> None:
        super().__init__()
        self.host_model = host.model
        self.output = host.output
        self.normalized_inside = normalization is not None
        if normalization is not None:
            mean, std = torch.tensor(normalization.mean), torch.tensor(normalization.std)
            self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1))
            self.register_buffer("offset", (-mean / std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[B K]."""
        if self.normalized_inside:
            images = images.permute(0, 3, 1, 2).float() * self.scale + self.offset
        return self.output(self.host_model(images))


def for_cpu(host: Host) -> Host:
    """The model in float32 on the CPU, in eval mode; the host itself where it is so already."""
    as_it_is = host.device.type == "cpu" and host.dtype == torch.float32
    if as_it_is and not any(module.training for module in host.model.modules()):
        return host
    moved = copy.deepcopy(host)
    moved.model.to("cpu", torch.float32).eval()
    return moved


def trace(program: Deployed, images: Tensor, batch_size: int | None) -> ExportedProgram:
    """``torch.export`` it.

    Args:
        program: In eval mode.
        images: At least two images of the right shape and type.
        batch_size: None for any.
    """
    example = (
        images[:2] if batch_size is None else images[:1].expand(batch_size, *images.shape[1:]).contiguous()
    )
    dynamic = {0: Dim("batch", min=1, max=MOST_IMAGES)} if batch_size is None else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        return torch.export.export(program, (example,), dynamic_shapes=(dynamic,))


def to_uint8(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The pixels that normalised images were made of: [B 3 H W] -> [B H W 3] uint8."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def digest(model: nn.Module) -> str:
    """sha256 of names, types, shapes and values of the state_dict."""
    found = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
