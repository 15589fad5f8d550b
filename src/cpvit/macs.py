"""Multiply-accumulates (1 MAC = 2 FLOPs) of one image through a model.

Two independent counts: :func:`count_macs` asks torch's own FLOP counter about the model as it is, pruned or
not, without computing anything; :class:`CostModel` is the closed formula that schedules are solved with. The
tests hold one against the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cpvit.adapters import BlockCosts, Host, open_host


def count_macs(model: nn.Module) -> int:
    """MACs of one image, counted by torch on the model as it is now (everything that is a matmul or conv).

    Runs on the "meta" device: no arithmetic is done and no weight is copied.
    """
    host = open_host(model)
    weights = {name: tensor.to("meta") for name, tensor in _tensors(model).items()}
    image = torch.empty(1, *host.image_shape, device="meta", dtype=next(model.parameters()).dtype)
    was_training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        torch.func.functional_call(model, weights, (image,))
    model.train(was_training)
    return int(counter.get_total_flops()) // 2


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in chain(model.named_parameters(), model.named_buffers())}


@dataclass(frozen=True)
class CostModel:
    """MACs of one image as a function of how many patches leave each block."""

    blocks: tuple[BlockCosts, ...]
    outside: int
    """Patch embedding, pooling and classifier: what pruning does not touch."""
    num_prefix: int
    num_patches: int
    pool_token: int = 0
    """What the head saves for each patch that does not reach it (attention pooling)."""

    def total(self, patches: Sequence[int]) -> int:
        """MACs when ``patches[l]`` patches leave block l."""
        before = (self.num_patches, *patches[:-1])
        gone = self.num_patches - patches[-1]
        return (
            self.outside
            - self.pool_token * gone
            + sum(
                block.macs(self.num_prefix + entering, self.num_prefix + leaving)
                for block, entering, leaving in zip(self.blocks, before, patches, strict=True)
            )
        )

    @property
    def dense(self) -> int:
        """MACs with every patch kept."""
        return self.total([self.num_patches] * len(self.blocks))


def cost_model(host: Host, heads: Sequence[int] | None = None, *, merges: bool = False) -> CostModel:
    """The formula for an untouched model, optionally with fewer heads per block.

    A method that merges spreads its tokens out again for a head that reads patches, which then saves nothing.
    What lies outside the blocks is the counted total less the formula's blocks.
    """
    dense = [block.costs() for block in host.blocks]
    inside = sum(cost.macs(host.num_tokens, host.num_tokens) for cost in dense)
    outside = count_macs(host.model) - inside
    if outside < 0:
        raise RuntimeError(f"the cost formula of {host.name} exceeds torch's count by {-outside} MACs")
    scaled = dense if heads is None else [_with_heads(*pair) for pair in zip(host.blocks, heads, strict=True)]
    pool_token = 0 if merges else host.pool_token_macs
    return CostModel(tuple(scaled), outside, host.num_prefix, host.num_patches, pool_token)


def _with_heads(block: Any, heads: int) -> BlockCosts:
    cost = block.costs()
    return cost._replace(
        attention_token=cost.attention_token * heads // block.num_heads,
        pair=cost.pair * heads // block.num_heads,
    )
