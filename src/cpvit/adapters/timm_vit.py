"""timm's VisionTransformer and its DeiT variants, seen as blocks the cascade can run.

The host's own submodules do the work (norms, projections, LayerScale, DropPath, gates), so nothing of timm's
forward is repeated here; only the order "norm, attention, scale, residual" is.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.models import vision_transformer as vit
from torch import Tensor, nn

from cpvit.adapters.common import (
    HostModule,
    branch,
    check_parts,
    dropout_of,
    gate_of,
    linear_heads,
    linear_macs,
    project_out,
    random_patches,
    refuse_inner_norm,
    refuse_masks,
    split_heads,
    timm_host,
)
from cpvit.adapters.host import BlockCosts, HeadParameter, Host
from cpvit.attention import AttentionInputs
from cpvit.core import HostArguments


class TimmBlock:
    """A pre-norm ``Block`` or a post-norm ``ResPostBlock``."""

    def __init__(self, block: HostModule) -> None:
        self.module = block
        self.attn = block.attn
        self.post_norm = isinstance(block, vit.ResPostBlock)

    @property
    def num_heads(self) -> int:
        """Heads the block has now."""
        return int(self.attn.num_heads)

    def attention_inputs(
        self,
        x: Tensor,
        positions: Tensor | None,
        extra: HostArguments,
    ) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D]."""
        refuse_masks(extra)
        attn = self.attn
        x = x if self.post_norm else self.module.norm1(x)
        query, key, value = split_heads(attn.qkv(x), attn.num_heads)
        return AttentionInputs(
            query=attn.q_norm(query),
            key=attn.k_norm(key),
            value=value,
            scale=attn.scale,
            gate=gate_of(attn, x),
            dropout=dropout_of(attn),
        )

    def attention_residual(self, x: Tensor, inputs: AttentionInputs, out: Tensor) -> Tensor:
        """x [B N C], out [B H N D] -> [B N C]."""
        out = project_out(self.attn, inputs, out)
        block = self.module
        return x + (block.drop_path1(block.norm1(out)) if self.post_norm else branch(block, 1, out))

    def mlp_residual(self, x: Tensor) -> Tensor:
        """[B N C] -> [B N C]."""
        block = self.module
        if self.post_norm:
            return x + block.drop_path2(block.norm2(block.mlp(x)))
        return x + branch(block, 2, block.mlp(block.norm2(x)))

    def costs(self) -> BlockCosts:
        """MACs per token and per pair of tokens."""
        width = self.attn.proj.in_features
        return BlockCosts(linear_macs(self.attn), 2 * width, linear_macs(self.module.mlp))

    def head_parameters(self) -> Sequence[HeadParameter]:
        """Fused Q, K, V rows and projection columns; gate rows where there is a gate."""
        attn = self.attn
        refuse_inner_norm(attn)
        width = attn.qkv.out_features // (3 * attn.num_heads)
        found = [*linear_heads(attn.qkv, 0, 3, width), HeadParameter(attn.proj, "weight", 1, 1, width)]
        if getattr(attn, "gate", None) is not None:
            found += linear_heads(attn.gate, 0, 1, width)
        return found

    def set_num_heads(self, count: int) -> None:
        """timm reads the count (and, in recent versions, the joined width) from the attention module."""
        self.attn.num_heads = count
        if "attn_dim" in vars(self.attn):
            self.attn.attn_dim = count * self.attn.head_dim


def open_timm_vit(model: nn.Module) -> Host | None:
    """Open a VisionTransformer; None if it is not one, UnsupportedModelError for an unknown variant."""
    if not isinstance(model, vit.VisionTransformer):
        return None
    check_parts(model, (vit.Block, vit.ResPostBlock), (vit.Attention,))
    blocks = [TimmBlock(block) for block in model.blocks.children()]
    return timm_host(model, "timm ViT", blocks, blocked=random_patches)
