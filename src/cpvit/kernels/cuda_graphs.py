"""CUDA graphs: a forward captured once and replayed, for batches too small to keep a GPU busy.

At batch 1 a Vision Transformer is bound by kernel launches, and pruning adds about a dozen small kernels per block. A
graph launches all of them at once. A pruned model can be captured because its shapes do not depend on the images:
every image keeps the same number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

WARM_UP = 3
"""Forwards before the capture: libraries select kernels and allocate workspaces in the first ones."""


class CapturedModel:
    """A model captured for one input shape; call it like the model.

    The graph reads the weights at their addresses: weights changed in place take effect. A model that was pruned again,
    moved or cast must be captured again.

    Args:
        model: Dense or pruned, in eval mode, on a CUDA device.
        images: [B 3 H W] on the same device; only shape and dtype matter.

    Raises:
        RuntimeError: There is no CUDA device.
        ValueError: The model is in training mode, or model or images are not on a CUDA device.

    Example:
        >>> prune_(model, PruneConfig(macs=0.6))
        >>> fast = CapturedModel(model, images)
        >>> logits = fast(images)
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        _check(model, images)
        self._images = images.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode():
            _warm_up(model, self._images)
            with torch.cuda.graph(self._graph):
                self._output = model(self._images)

    def __call__(self, images: Tensor) -> Any:
        """The model's output for ``images``, in new memory.

        Raises:
            ValueError: The images differ in shape, type or device from those the model was captured with.
        """
        check_same(self._images, images)
        with torch.inference_mode():
            self._images.copy_(images)
            self._graph.replay()
            return tree_map_only(Tensor, torch.clone, self._output)


def check_same(captured: Tensor, images: Tensor) -> None:
    """Raise ValueError unless a graph captured for ``captured`` can take ``images``."""
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(captured, what), getattr(images, what)
        if expected != got:
            expected, got = (tuple(each) if what == "shape" else each for each in (expected, got))
            raise ValueError(
                f"the model was captured for images of {what} {expected} and got {got}; a CUDA graph is fixed: "
                "capture the model once more for these, or call the model itself"
            )


def check_devices(model: nn.Module, images: Tensor) -> None:
    """Raise unless model and images are where a CUDA graph can be captured.

    Raises:
        RuntimeError: There is no CUDA device.
        ValueError: Model or images are not on a CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "CapturedModel needs a CUDA device and torch sees none; call the model itself, or torch.compile it"
        )
    for what, device in (("model", next(model.parameters()).device), ("images", images.device)):
        if device.type != "cuda":
            raise ValueError(
                f"CapturedModel needs the {what} on a CUDA device, got {device}; move it with .to('cuda')"
            )


def _check(model: nn.Module, images: Tensor) -> None:
    if model.training:
        raise ValueError(
            "CapturedModel is for inference and the model is in training mode; call model.eval() first"
        )
    check_devices(model, images)


def _warm_up(model: nn.Module, images: Tensor) -> None:
    """Run on a side stream, as graph capture requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
