"""A layer of Hugging Face transformers, seen as a block the cascade can run.

The layer's own modules do the work (norms, projections, LayerScale, DropPath, MLP); only their order is here.

Legend: B images, H heads, N tokens, D head dimension, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cpvit.adapters.common import join_heads, linear_heads, linear_macs
from cpvit.adapters.hf_families import LayerNames
from cpvit.adapters.host import BlockCosts, HeadParameter, UnsupportedModelError
from cpvit.attention import AttentionInputs
from cpvit.core import HostArguments


class TransformersBlock:
    """A pre-norm layer: norm, attention, residual, norm, MLP, residual."""

    def __init__(self, layer: nn.Module, names: LayerNames) -> None:
        self.module: Any = layer
        self.names = names

    @property
    def attn(self) -> Any:
        """The layer's attention module."""
        return getattr(self.module, self.names.attention)

    @property
    def projection(self) -> Any:
        """Output projection of the attention."""
        return getattr(self.attn, self.names.projection)

    @property
    def num_heads(self) -> int:
        """Heads the layer has now."""
        return int(getattr(self.attn, self.names.heads))

    def attention_inputs(  # nothing here depends on the position
        self,
        x: Tensor,
        positions: Tensor | None,
        extra: HostArguments,
    ) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D]."""
        refuse_masks(extra)
        attn, names = self.attn, self.names
        x = getattr(self.module, names.norm1)(x)
        query, key, value = (self._heads(linear(x)) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
        dropout = float(getattr(attn, names.dropout)) if attn.training else 0.0
        return AttentionInputs(query, key, value, scale=getattr(attn, names.scale), dropout=dropout)

    def _heads(self, projected: Tensor) -> Tensor:
        """[B N H*D] -> [B H N D]."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attention_residual(self, x: Tensor, inputs: AttentionInputs, out: Tensor) -> Tensor:
        """x [B N C], out [B H N D] -> [B N C]."""
        return x + self._apply(self.names.after_attention, self.projection(join_heads(out)))

    def mlp_residual(self, x: Tensor) -> Tensor:
        """[B N C] -> [B N C]."""
        normed = getattr(self.module, self.names.norm2)(x)
        return x + self._apply(self.names.after_mlp, self.module.mlp(normed))

    def _apply(self, names: Sequence[str], x: Tensor) -> Tensor:
        """The named modules of the layer, one after the other: [B N C] -> [B N C]."""
        for name in names:
            x = getattr(self.module, name)(x)
        return x

    def costs(self) -> BlockCosts:
        """MACs per token and per pair of tokens."""
        return BlockCosts(
            attention_token=linear_macs(self.attn),
            pair=2 * self.projection.in_features,
            mlp_token=linear_macs(self.module.mlp),
        )

    def head_parameters(self) -> Sequence[HeadParameter]:
        """Rows of Q, K and V and columns of the projection."""
        inputs = [self.attn.q_proj, self.attn.k_proj, self.attn.v_proj]
        for linear in (*inputs, self.projection):
            if type(linear) is not nn.Linear:
                raise UnsupportedModelError(
                    f"heads cannot be pruned where a projection is a {type(linear).__name__} (quantised, or "
                    "with an adapter): its weights cannot be cut; prune patches only (head_keep_rate=1)"
                )
        width = inputs[0].out_features // self.num_heads
        found = [part for linear in inputs for part in linear_heads(linear, 0, 1, width)]
        return [*found, HeadParameter(self.projection, "weight", 1, 1, width)]

    def set_num_heads(self, count: int) -> None:
        """The host's own forward reads its shapes from the weights; it keeps the count for others to read."""
        setattr(self.attn, self.names.heads, count)


def refuse_masks(extra: HostArguments) -> None:
    """Only the arguments that change the attention matter; transformers passes others through its layers.

    While exporting, transformers builds a mask that masks nothing (it drops it otherwise, where it can look
    at it): that one is not an argument of the user's, and is left out of the exported graph.
    """
    given = [name for name in ("attention_mask", "is_causal") if _is_given(extra.get(name))]
    if given and not _exporting():
        raise ValueError(
            f"a pruned model cannot take {' and '.join(given)}: it speaks of patches that may have left"
        )


def _is_given(value: object) -> bool:
    return value is not None and value is not False


def _exporting() -> bool:
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())
