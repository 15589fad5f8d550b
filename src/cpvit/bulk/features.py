"""What to embed an image by: what the classifier reads, the class token, the mean of the patches, or all tokens.

A model's own forward runs; hooks see what is needed on the way, so that every supported library is served alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpvit.adapters import Host
from cpvit.core import TokenState, take_tokens
from cpvit.pruning.cascade import BlockHook, BlockOutput, keep_everything
from cpvit.pruning.install import install, installed

Kind: TypeAlias = Literal["pooled", "class", "mean", "tokens"]


@dataclass(frozen=True)
class Tokens:
    """The tokens that leave the last block, prefix tokens first, of B images.

    Attributes:
        values: ``[B P+n C]``, after the model's last norm where it normalises all tokens.
        positions: ``[B P+n]`` place in the grid, row-major; -1 for a prefix token.
        sizes: ``[B P+n]`` float32, patches that each token stands for; 1 for a prefix token.
    """

    values: Tensor
    positions: Tensor
    sizes: Tensor


class FeatureReader:
    """Sees the features of a model in its forward; :meth:`take` hands out those of the latest.

    Args:
        host: The model as it will run: pruned or not.
        kind: "pooled": what the classifier reads, or the output of a model without one. "class": the first prefix
            token. "mean": of the patch tokens, each as often as it stands for a patch. "tokens": all of them.

    Raises:
        ValueError: The model has no class token, and "class" was asked for.
    """

    def __init__(self, host: Host, kind: Kind) -> None:
        if kind == "class" and not host.num_prefix:
            raise ValueError(f"{host.name} has no class token; use --features mean or pooled")
        self.kind = kind
        self._host = host
        self._read: list[tuple[nn.Linear, Tensor]] = []
        self._output: Tensor | None = None
        self._last: BlockOutput | None = None
        self._normed: Tensor | None = None
        outside = _modules_outside_blocks(host)
        if kind == "pooled":
            host.model.register_forward_hook(self._model_ran)
            for module in outside:
                if isinstance(module, nn.Linear) and module.out_features == host.num_classes:
                    module.register_forward_pre_hook(self._classifier_reads)
            return
        container = installed(host) or install(host, keep_everything(host))
        container.cascade.hooks.append(BlockHook(self._block_ran))
        for module in outside:
            if "Norm" in type(module).__name__:
                module.register_forward_hook(self._norm_ran)

    def _classifier_reads(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Linear)
        if inputs[0].dim() == 2:
            self._read.append((module, inputs[0]))

    def _model_ran(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._output = self._host.output(output)

    def _block_ran(self, output: BlockOutput) -> None:
        if output.block == self._host.depth - 1:
            self._last, self._normed = output, None

    def _norm_ran(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """The first norm after the blocks that sees all tokens, or the grid that they were spread out to."""
        if self._last is None or self._normed is not None or not isinstance(output, Tensor):
            return
        if output.dim() == 3 and output.shape[1] in (self._last.tokens.shape[1], self._host.num_tokens):
            self._normed = output

    @torch.inference_mode()
    def take(self) -> Tensor | Tokens:
        """Features of the latest forward: ``[B C]``, or the tokens.

        Raises:
            ValueError: The model has no pooled features.
        """
        if self.kind == "pooled":
            return self._pooled()
        tokens = self._tokens()
        if self.kind == "tokens":
            return tokens
        return tokens.values[:, 0] if self.kind == "class" else _weighted_mean(tokens, self._host.num_prefix)

    def _pooled(self) -> Tensor:
        read, output = self._read, self._output
        self._read, self._output = [], None
        assert output is not None, "the forward ran"
        if not self._host.num_classes and output.dim() == 2:
            return output
        # Two heads, of a distilled model, are averaged, and so is what they read.
        answers = [F.linear(inputs, head.weight, head.bias) for head, inputs in read]
        if not answers or not torch.allclose(torch.stack(answers).mean(dim=0), output, rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{self._host.name} pools in a way that is not known; use --features class, mean or tokens"
            )
        return torch.stack([inputs for _, inputs in read]).mean(dim=0)

    def _tokens(self) -> Tokens:
        last, self._last = self._last, None
        assert last is not None, "the forward ran all blocks"
        state, prefix = last.state, self._host.num_prefix
        values = last.tokens if self._normed is None else self._normed
        if values.shape[1] > last.tokens.shape[1]:  # merged tokens were spread out to the grid
            values = take_tokens(values, state.positions, prefix)
        ahead = state.positions.new_full((len(values), prefix), -1)
        patches = _patches_in(state)
        sizes = torch.cat([patches.new_ones(len(values), prefix), patches], dim=1)
        return Tokens(values, torch.cat([ahead, state.positions], dim=1), sizes)


def _patches_in(state: TokenState) -> Tensor:
    """How many patches each token stands for: [B n], float32. Not the sizes that weigh it in the attention."""
    counts = torch.ones_like(state.positions, dtype=torch.float32)
    if state.carrier is None:
        return counts
    return torch.zeros_like(counts).scatter_add(1, state.carrier, torch.ones_like(state.carrier).float())


def _weighted_mean(tokens: Tokens, num_prefix: int) -> Tensor:
    weights = tokens.sizes[:, num_prefix:, None]
    patches = tokens.values[:, num_prefix:].float()
    return (patches * weights).sum(dim=1) / weights.sum(dim=1)


def _modules_outside_blocks(host: Host) -> list[nn.Module]:
    inside = {id(module) for block in host.blocks for module in block.module.modules()}
    return [module for module in host.model.modules() if id(module) not in inside]
