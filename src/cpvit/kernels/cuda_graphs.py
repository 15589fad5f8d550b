"""CUDA graphs: a forward recorded once and replayed, for batches too small to keep a GPU busy.

At batch 1 a pruned Vision Transformer spends its time launching kernels, and pruning adds some: which tokens stay
is decided by a dozen small ones per block. A graph launches all of them at once. It works since a pruned model's
shapes do not depend on the images: every image keeps the same number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

WARM_UP = 3
"""Forwards before the recording: libraries choose their kernels and take their workspaces in the first."""


class CapturedModel:
    """A model recorded for one shape of input; call it like the model.

    It replays the weights where they lie: weights changed in place are seen, a model pruned anew, moved or cast is
    not, so capture it again then.

    Args:
        model: Dense or pruned, in eval mode, on a CUDA device.
        images: [B 3 H W] on the same device; the values do not matter, shape and type do.

    Raises:
        RuntimeError: There is no CUDA device.
        ValueError: The model trains, or model or images are not on a CUDA device.

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
        """What the model gives for ``images``, in memory of its own.

        Raises:
            ValueError: The images differ in shape, type or device from those the model was captured with.
        """
        check_same(self._images, images)
        with torch.inference_mode():
            self._images.copy_(images)
            self._graph.replay()
            return tree_map_only(Tensor, torch.clone, self._output)


def check_same(captured: Tensor, images: Tensor) -> None:
    """Raise ValueError unless a recording for ``captured`` fits ``images``."""
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(captured, what), getattr(images, what)
        if expected != got:
            expected, got = (tuple(each) if what == "shape" else each for each in (expected, got))
            raise ValueError(
                f"the model was captured for images of {what} {expected} and got {got}; a CUDA graph is fixed: "
                "capture the model once more for these, or call the model itself"
            )


def _check(model: nn.Module, images: Tensor) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "CapturedModel needs a CUDA device and torch sees none; call the model itself, or torch.compile it"
        )
    if model.training:
        raise ValueError(
            "CapturedModel is for inference and the model is in training mode; call model.eval() first"
        )
    for what, device in (("model", next(model.parameters()).device), ("images", images.device)):
        if device.type != "cuda":
            raise ValueError(
                f"CapturedModel needs the {what} on a CUDA device, got {device}; move it with .to('cuda')"
            )


def _warm_up(model: nn.Module, images: Tensor) -> None:
    """On a stream of its own, as a recording needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
