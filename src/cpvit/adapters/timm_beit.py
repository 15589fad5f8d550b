"""timm's BEiT and BEiT v2: a bias for every pair of tokens, by their relative position.

Once patches have left, the bias of the surviving pairs is looked up for every image. Legend: B images, H
heads, N tokens, n patches alive, N0 patches of the untouched image, D head dimension, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.models import beit
from torch import Tensor, nn

from cpvit.adapters.common import (
    SHARED_BIAS,
    HostModule,
    bias_heads,
    check_parts,
    dropout_of,
    fused_qkv,
    linear_heads,
    look_up,
    pair_index,
    refuse_masks,
    split_heads,
    timm_host,
)
from cpvit.adapters.host import HeadParameter, Host, UnsupportedModelError
from cpvit.adapters.timm_vit import TimmBlock
from cpvit.attention import AttentionInputs
from cpvit.core import HostArguments

SHARED = "shared_rel_pos_bias"
"""Keyword under which the host hands one bias [H N0+1 N0+1] to all blocks."""


class BeitBlock(TimmBlock):
    """A BEiT block: Q, K, V without a key bias, a table of relative positions, LayerScale."""

    def __init__(self, block: HostModule, *, shared_bias: bool) -> None:
        super().__init__(block)
        self.shared_bias = shared_bias

    def attention_inputs(self, x: Tensor, positions: Tensor | None, extra: HostArguments) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D] and the bias of the pairs still alive."""
        refuse_masks({name: value for name, value in extra.items() if name != SHARED})
        shared = extra.get(SHARED)
        query, key, value = split_heads(fused_qkv(self.attn, self.module.norm1(x)), self.attn.num_heads)
        return AttentionInputs(
            query=query,
            key=key,
            value=value,
            scale=self.attn.scale,
            bias=relative_bias(self.attn, shared if isinstance(shared, Tensor) else None, positions),
            dropout=dropout_of(self.attn),
        )

    def head_parameters(self) -> Sequence[HeadParameter]:
        """Q, K, V rows and biases, projection columns, columns of the table of relative positions."""
        if self.shared_bias:
            raise UnsupportedModelError(SHARED_BIAS)
        attn = self.attn
        width = attn.proj.in_features // attn.num_heads
        found = [HeadParameter(attn.proj, "weight", 1, 1, width), *bias_heads(attn, width)]
        found += linear_heads(attn.qkv, 0, 3, width)
        if attn.relative_position_bias_table is not None:
            found.append(HeadParameter(attn, "relative_position_bias_table", 1, 1, 1))
        return found


def relative_bias(attn: HostModule, shared: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """Sum of the block's own bias and the shared one, over the pairs still alive.

    Args:
        attn: The host's attention.
        shared: [H N0+1 N0+1].
        positions: [B n], None while every patch is alive.

    Returns:
        [1 H N N], [H N N] or [B H N N]; None if the host has no bias.
    """
    own = own_bias(attn, positions)
    if shared is not None and positions is not None:
        pairs = pair_index(positions, 1, shared.shape[-1])
        shared = look_up(shared.flatten(1), pairs, positions.shape[1] + 1)
    if own is None or shared is None:
        return shared if own is None else own
    return own + shared


def own_bias(attn: HostModule, positions: Tensor | None) -> Tensor | None:
    """Bias from the block's own table: [1 H N N] or [B H N N]; None if it has none."""
    table, index = attn.relative_position_bias_table, attn.relative_position_index
    if table is None:
        return None
    if positions is None:
        bias: Tensor = attn._get_rel_pos_bias()
        return bias
    # Only the survivors are looked up: spreading the table over all pairs first would be wasted.
    pairs = index.flatten()[pair_index(positions, 1, index.shape[0])]
    return look_up(table.t(), pairs, positions.shape[1] + 1)


def open_timm_beit(model: nn.Module) -> Host | None:
    """Open a BEiT; None if it is not one, UnsupportedModelError for an unknown variant."""
    if not isinstance(model, beit.Beit):
        return None
    check_parts(model, (beit.Block,), (beit.Attention,))
    shared = model.rel_pos_bias is not None
    blocks = [BeitBlock(block, shared_bias=shared) for block in model.blocks.children()]
    return timm_host(model, "timm BEiT", blocks, positional=(SHARED,))
