"""Is the cascade right about this model? With everything kept it must reproduce the host's own output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cpvit.adapters import Host
from cpvit.core import BlockStep, CPViT
from cpvit.pruning.cascade import BlockHook, BlockOutput, Cascade, PruningBypassError, registered_hook
from cpvit.pruning.install import install, uninstall
from cpvit.pruning.opening import open_untouched

SLACK = 128
"""Rounding errors of one block, in units of the dtype's epsilon; they add up like a random walk over depth.
Trained models with large activations need some dozens; a forgotten part of a block shows a thousand times more."""


class VerificationError(RuntimeError):
    """With everything kept the pruned model's output differs from the host's: cpvit does not know this model."""


@dataclass(frozen=True)
class Verification:
    """Outcome of :func:`verify`."""

    model: str
    family: str
    error: float
    """Largest difference of any output, relative to the largest output."""
    tolerance: float
    first_block: int | None
    """First block whose output differs, None if none does."""
    own_error: float | None
    """Largest difference that any block, or what follows them, makes by itself, given the host's own tokens, in
    float64. Looked for only where the outputs differ by more than the tolerance; None where it differs without that
    much precision already, or cannot be told."""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance, or nothing but rounding that the model itself amplifies."""
        return self.error <= self.tolerance or self._amplified

    @property
    def _amplified(self) -> bool:
        return self.own_error is not None and self.own_error <= tolerance(torch.float64, 1)

    def summary(self) -> str:
        """One line."""
        if self.error <= self.tolerance:
            return f"{self.model}: keep-everything error {self.error:.1e} (tolerance {self.tolerance:.1e})"
        if self._amplified:
            return (
                f"{self.model}: keep-everything error {self.error:.1e} (tolerance {self.tolerance:.1e}), rounding that "
                f"the model amplifies: no block differs by more than {self.own_error:.1e} by itself"
            )
        place = "outside the blocks" if self.first_block is None else f"first in block {self.first_block}"
        return (
            f"{self.model}: with everything kept the output differs from the host's by {self.error:.1e} "
            f"(tolerance {self.tolerance:.1e}), {place}"
        )


def verify(model: nn.Module, *, seed: int = 0) -> Verification:
    """Compare an untouched model with its own cascade, everything kept, on one random image.

    Raises:
        UnsupportedModelError: The model cannot be pruned at all.
        ValueError: The model is pruned already.
    """
    return verify_host(open_untouched(model, "verify"), seed=seed)


def verify_host(host: Host, *, seed: int = 0) -> Verification:
    """:func:`verify` for a model that is opened already."""
    image = _random_image(host, seed)
    with host.in_eval_mode():
        return _compare(host, image)


def check(host: Host) -> None:
    """Raise unless :func:`verify` passes.

    Raises:
        VerificationError: It does not; the message names the first block that differs.
    """
    result = verify_host(host)
    if not result.passed:
        raise VerificationError(result.summary() + "; this model is not pruned, please report it")


def tolerance(dtype: torch.dtype, depth: int) -> float:
    """Relative error that rounding alone explains."""
    return float(torch.finfo(dtype).eps * SLACK * depth**0.5)


@torch.no_grad()  # not in inference mode: a host may keep what it computes now (BEiT's indices) for training
def _compare(host: Host, image: Tensor) -> Verification:
    expected = _output(host, image)
    limit = tolerance(image.dtype, host.depth)
    try:
        got = _run_cascade(host, image, lambda block: None)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as failure:
        if isinstance(failure, (PruningBypassError, torch.OutOfMemoryError)):
            raise
        reason = str(failure).partition("\n")[0]
        raise VerificationError(
            f"{host.name}: its blocks do not run in the cascade ({reason}); this model is not pruned, please report it"
        ) from failure
    error = relative_error(got, expected)
    if error <= limit:
        return Verification(host.name, host.family, error, limit, None, None)
    own, first = _by_themselves(host, image)
    return Verification(host.name, host.family, error, limit, first, own)


def _output(host: Host, image: Tensor) -> Tensor:
    """Run the host, in the dtype of the image whatever its own is."""
    tensors = chain(host.model.named_parameters(), host.model.named_buffers())
    weights = {
        name: tensor.detach().to(image.dtype) for name, tensor in tensors if tensor.is_floating_point()
    }
    devices = [image.device] if image.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(
            0
        )  # embeddings that draw at random (a shuffle of the patches) draw alike in both runs
        return host.output(torch.func.functional_call(host.model, weights, (image,)))


def _random_image(host: Host, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, *host.image_shape, generator=generator)
    # Half precision rounds so coarsely that a forgotten LayerScale could hide in it: float32 tells.
    half = host.dtype in (torch.float16, torch.bfloat16)
    return image.to(host.device, torch.float32 if half else host.dtype)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value; infinite if shapes differ or a value is not finite."""
    if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    scale = expected.abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    return float((got.double() - expected.double()).abs().max() / scale)


def _run_cascade(host: Host, image: Tensor, see: Callable[[BlockOutput], None]) -> Tensor:
    """Output with everything kept; ``see`` is called after every block."""
    cascade = Cascade(host, CPViT(), _both_routes(host), dense_features=bool(host.grid_reader))
    install(host, cascade)
    try:
        with registered_hook(cascade, BlockHook(see)):
            return _output(host, image)
    finally:
        uninstall(host)


def _both_routes(host: Host) -> tuple[BlockStep, ...]:
    """Keep everything, with the attention scored in every other block and fused in the rest."""
    return tuple(BlockStep(host.num_patches, score=number % 2 == 0) for number in range(host.depth))


def _by_themselves(host: Host, image: Tensor) -> tuple[float | None, int | None]:
    """Largest error that a block or the head makes by itself, in float64, and the first block that makes one.

    A model with large weights may amplify rounding from block to block until it looks like a mistake. A mistake is
    large in its own block, given the host's own tokens, and does not shrink with the dtype.
    """
    errors, limit = _errors(host, image), tolerance(image.dtype, 1)
    if max(errors) > limit:
        return None, _first(errors[:-1], limit)
    try:
        errors = _errors(host, image.double())
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # no float64 on this device, or not in this model
        return None, None
    first = _first(errors[:-1], tolerance(torch.float64, 1))
    return max(errors) if len(errors) == host.depth + 1 else None, first


def _first(errors: list[float], limit: float) -> int | None:
    return next((block for block, error in enumerate(errors) if error > limit), None)


def _errors(host: Host, image: Tensor) -> list[float]:
    """Relative error of each block's tokens, and last of the output, each given what the host's own blocks give."""
    expected: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        expected.append(host.tokens(output))

    hooks = [block.module.register_forward_hook(keep) for block in host.blocks]
    try:
        output = _output(host, image)
    finally:
        for hook in hooks:
            hook.remove()
    errors: list[float] = []

    def compare_and_replace(block: BlockOutput) -> None:
        if block.block < len(expected):
            errors.append(relative_error(block.tokens, expected[block.block]))
            if block.tokens.shape == expected[block.block].shape:
                block.tokens.copy_(expected[block.block])

    got = _run_cascade(host, image, compare_and_replace)
    return [*errors, relative_error(got, output)]
