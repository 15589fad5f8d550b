"""Multiply-accumulates (1 MAC = 2 FLOPs) of one image, counted by torch's own FLOP counter on the model as it is."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cpvit.adapters import Host, open_host


def count_macs(model: nn.Module) -> int:
    """MACs of one image, counted by torch on the model as it is now (everything that is a matmul or conv).

    Runs on the "meta" device: no arithmetic is done, and no weight is copied but those of heads that were cut, for the
    moment. A host that looks at values (a mask of padded patches) runs once where it is.

    Raises:
        RuntimeError: torch counted nothing, which cannot be.
    """
    return host_macs(open_host(model))


def host_macs(host: Host) -> int:
    """:func:`count_macs` for a model that is opened already."""
    host = _apart(host)
    counter = FlopCounterMode(display=False)
    # In inference mode the counter of torch 2.5 sees whole layers, which it has no formula for: it would say 0.
    # Where the weights are real, gradients keep the attention away from its padded buffers.
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(host.reads_values),
        host.in_eval_mode(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        device = host.device if host.reads_values else torch.device("meta")
        weights = {name: tensor.to(device) for name, tensor in _tensors(host.model).items()}
        image = torch.zeros(
            1, *host.image_shape, device=device, dtype=host.dtype, requires_grad=host.reads_values
        )
        with counter:
            torch.func.functional_call(host.model, weights, (image,))
    flops = int(counter.get_total_flops())
    if not flops:
        raise RuntimeError(f"torch {torch.__version__} counted no operation of {host.name}; update torch")
    return flops // 2


def _apart(host: Host) -> Host:
    """A copy that shares its weights, for the count alone; the model itself where it cannot be copied.

    Weights without values must not be seen by threads that call the model meanwhile: layer norm takes them for none.
    """
    try:
        return host.copy_sharing_weights()
    except Exception:
        # A hook, or an attribute that is not made to be copied (a lock, a file). The count is the same.
        return host


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in chain(model.named_parameters(), model.named_buffers())}
