"""timm's ViTs with relative positions (vit_relpos_*, vit_srelpos_*): a bias for every pair of tokens.

The host's own module computes the bias, from a table or a small MLP; once patches have left, the surviving
pairs are looked up in it.

Legend: B images, H heads, N tokens, P prefix tokens, n patches alive, N0 patches of the untouched image,
D head dimension, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import RelPosBias, RelPosMlp
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from cpvit.adapters.common import (
    SHARED_BIAS,
    HostModule,
    check_parts,
    linear_heads,
    linear_macs,
    look_up,
    pair_index,
    refuse_masks,
    timm_host,
)
from cpvit.adapters.host import BlockCosts, HeadParameter, Host, UnsupportedModelError
from cpvit.adapters.timm_vit import TimmBlock
from cpvit.attention import AttentionInputs, replaced
from cpvit.core import HostArguments

SHARED = "shared_rel_pos"
"""Keyword under which the host hands one bias [1 H P+N0 P+N0] to all blocks."""


class RelPosBlock(TimmBlock):
    """A pre-norm ``RelPosBlock`` or a ``ResPostRelPosBlock``: a ViT block with a bias."""

    def __init__(self, block: HostModule, *, num_prefix: int) -> None:
        super().__init__(block)
        self.post_norm = isinstance(block, relpos.ResPostRelPosBlock)
        self.num_prefix = num_prefix

    def attention_inputs(self, x: Tensor, positions: Tensor | None, extra: HostArguments) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D] and the bias of the pairs still alive."""
        refuse_masks({name: value for name, value in extra.items() if name != SHARED})
        inputs = super().attention_inputs(x, positions, {})
        own = self.attn.rel_pos
        bias = extra.get(SHARED) if own is None else own.get_bias()
        if not isinstance(bias, Tensor):
            return inputs
        if positions is None:
            return replaced(inputs, bias=bias)
        pairs = pair_index(positions, self.num_prefix, bias.shape[-1])
        return replaced(inputs, bias=look_up(bias[0].flatten(1), pairs, self.num_prefix + positions.shape[1]))

    def costs(self) -> BlockCosts:
        """MACs per token and per pair of tokens; what an MLP for the bias costs does not depend on either."""
        projections = linear_macs(self.attn.qkv) + linear_macs(self.attn.proj)
        return super().costs()._replace(attention_token=projections)

    def head_parameters(self) -> Sequence[HeadParameter]:
        """Those of a ViT block, and the bias's columns."""
        bias = self.attn.rel_pos
        if bias is None:
            raise UnsupportedModelError(SHARED_BIAS)
        if isinstance(bias, RelPosBias):
            return [*super().head_parameters(), HeadParameter(bias, "relative_position_bias_table", 1, 1, 1)]
        return [*super().head_parameters(), *linear_heads(bias.mlp.fc2, 0, 1, 1)]

    def set_num_heads(self, count: int) -> None:
        """timm reads the count from the attention module and from its bias."""
        super().set_num_heads(count)
        bias = self.attn.rel_pos
        bias.bias_shape = (*bias.bias_shape[:2], count)
        if isinstance(bias, RelPosMlp):
            bias.num_heads = count


def open_timm_relpos(model: nn.Module) -> Host | None:
    """Open a VisionTransformerRelPos; None if it is not one, UnsupportedModelError for an unknown variant."""
    if not isinstance(model, relpos.VisionTransformerRelPos):
        return None
    check_parts(model, (relpos.RelPosBlock, relpos.ResPostRelPosBlock), (relpos.RelPosAttention,))
    prefix = int(model.num_prefix_tokens)
    blocks = [RelPosBlock(block, num_prefix=prefix) for block in model.blocks.children()]
    return timm_host(model, "timm ViT with relative positions", blocks, positional=(SHARED,))
