"""The interface between the cascade and the libraries: what every adapter provides about its model.

Legend: B images, H heads, N tokens, C channels, D head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cpvit.core import BlockView, HostArguments


class UnsupportedModelError(TypeError):
    """The model cannot be pruned; the message says why and what is supported."""


class BlockCosts(NamedTuple):
    """Multiply-accumulates of one block: N*N*pair + N*attention_token + M*mlp_token, M tokens in the MLP."""

    attention_token: int
    """Projections Q, K, V and output, per token."""
    pair: int
    """query @ key and attention @ value, per pair of tokens."""
    mlp_token: int
    """MLP, per token."""

    def macs(self, tokens_in: int, tokens_out: int) -> int:
        """MACs of the block for one image when ``tokens_in`` enter it and ``tokens_out`` reach its MLP."""
        return self.pair * tokens_in**2 + self.attention_token * tokens_in + self.mlp_token * tokens_out


class HeadParameter(NamedTuple):
    """A parameter that has a slice per head, to be cut when heads are pruned."""

    owner: nn.Module
    name: str
    dim: int
    groups: int
    """How often the run of heads is repeated along ``dim`` (3 for a fused Q, K, V; 1 otherwise)."""
    width: int
    """Entries per head (the head dimension, or 1 for a per-head bias)."""


class HostBlock(BlockView, Protocol):
    """A block view that also knows its size and how its heads can be cut."""

    @property
    def num_heads(self) -> int:
        """Heads the block has now."""
        ...

    @property
    def module(self) -> nn.Module:
        """The host's block."""
        ...

    def costs(self) -> BlockCosts:
        """MACs per token and per pair, with the heads the block has now."""
        ...

    def head_parameters(self) -> Sequence[HeadParameter]:
        """Parameters to cut when heads go; raises UnsupportedModelError where that is not exact."""
        ...

    def set_num_heads(self, count: int) -> None:
        """Set the number of heads, which the (already cut) weights hold, in the host's attention module."""
        ...


def _as_it_is(result: Any) -> Any:
    return result


def _never(host: Host, extra: HostArguments) -> str | None:
    return None


@dataclass(frozen=True)
class Host:
    """A model opened for pruning."""

    family: str
    """Name of the family in the support table, e.g. "timm ViT"."""
    model: nn.Module
    parent: nn.Module
    """Module that holds the blocks ..."""
    attribute: str
    """... under this name."""
    blocks: tuple[HostBlock, ...]
    num_prefix: int
    """Class, distillation and register tokens at the front of the sequence: never pruned."""
    grid: tuple[int, int]
    """Patch rows and columns; of a video the rows of all its frames."""
    image_shape: tuple[int, ...]
    """Channels, height, width of one input image; of a video its frames come first."""
    pools_patches: bool
    """Whether the head reads patches (average or attention pooling): merged ones are then spread out again."""
    discards_patches: bool = False
    """Whether nothing after the blocks reads a patch, and none is handed out: what leaves the last block is free."""
    pool_token_macs: int = 0
    """MACs the head spends per patch it reads (attention pooling)."""
    forbidden: tuple[str, ...] = ()
    """Methods of ``model`` that take blocks out of it and bypass the pruning."""
    walkers: tuple[str, ...] = ()
    """Methods of ``model`` that iterate over the blocks as its forward does, and return what leaves inner ones."""
    positional: tuple[str, ...] = ()
    """Names of the arguments the host passes to its blocks by position, after the tokens."""
    reads_values: bool = False
    """Whether the model's forward looks at values of tensors, so that it cannot run on the meta device."""
    grid_reader: str = ""
    """Why the model can only be pruned with dense_features=True: who reads every patch in its place."""
    in_tuple: bool = False
    """Whether the host's blocks return a tuple, of which the tokens are the first."""
    tokens_first: bool = False
    """Whether they are given, and return, tokens as [N B C]."""
    head: str = ""
    """Method of ``model`` that reads the tokens after the blocks, where it is one apart (timm's forward_head)."""
    output: Callable[[Any], Tensor] = _as_it_is
    """The tensor to compare and classify with, from what ``model(images)`` returns."""
    blocked: Callable[[Host, HostArguments], str | None] = _never
    """Why this forward cannot be pruned, from the host's settings and the arguments of its first block; None
    if it can. A function of the host, not a closure over a model, so that it stays right in a copied model."""
    num_classes: int = 0
    """Of the classifier; 0 if there is none."""
    architecture: str = ""
    """The model's name, where it does not carry one itself."""
    resizing: str = ""
    """How to set another image size, where the model takes any."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's first parameter."""
        return next(self.model.parameters()).dtype

    @contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """The model is in eval mode meanwhile; afterwards every module is in the mode it was in, frozen ones too."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, was_training in modes:
                module.training = was_training

    def tokens(self, given: Any) -> Tensor:
        """[B N C] from what a block is given, or returns: alone, first in a tuple, or in a list of one."""
        if isinstance(given, list) and len(given) > 1:
            raise ValueError(
                f"{self.name} was given crops of {len(given)} sizes at once; pruned, it takes one"
            )
        tokens: Tensor = given[0] if isinstance(given, (tuple, list)) else given
        return tokens.transpose(0, 1) if self.tokens_first else tokens

    def returned(self, tokens: Tensor, given: object) -> Any:
        """What the host expects of a block that was ``given`` tokens, when ``tokens`` [B N C] leave it."""
        tokens = tokens.transpose(0, 1) if self.tokens_first else tokens
        return [tokens] if isinstance(given, list) else (tokens,) if self.in_tuple else tokens

    def copy_sharing_weights(self) -> Host:
        """The same model once more, to be pruned apart; parameters and buffers are the very same tensors."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        return copy.deepcopy(self, {id(tensor): tensor for tensor in tensors})

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def embed_dim(self) -> int:
        """Channels of a token: what the last linear layer of a block (the end of its MLP) gives."""
        linears = [layer for layer in self.blocks[0].module.modules() if isinstance(layer, nn.Linear)]
        return linears[-1].out_features

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, prefix included."""
        return self.num_prefix + self.num_patches

    @property
    def name(self) -> str:
        """The model's own name where it has one, else its class."""
        configuration = getattr(self.model, "pretrained_cfg", None) or {}
        return str(self.architecture or configuration.get("architecture") or type(self.model).__name__)
