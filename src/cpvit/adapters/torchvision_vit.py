"""torchvision's VisionTransformer (vit_b_16 ... vit_h_14), seen as blocks the cascade can run.

Its attention is ``nn.MultiheadAttention``, which gives no access to queries and keys: they are projected here
with its own weights. After heads are cut these no longer fit what that module checks for itself (it wants
heads times head size to be the model's width), so a block with cut heads runs in the cascade only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from cpvit.adapters.common import check_blocks, join_heads, linear_macs, split_heads
from cpvit.adapters.host import BlockCosts, HeadParameter, Host
from cpvit.attention import AttentionInputs
from cpvit.core import HostArguments

_SIZES = {(12, 768): "b", (24, 1024): "l", (32, 1280): "h"}
"""Depth and width -> letter of torchvision's names."""


class EncoderBlockView:
    """A pre-norm ``EncoderBlock``."""

    def __init__(self, block: Any) -> None:
        self.module = block
        self.attn = block.self_attention

    @property
    def num_heads(self) -> int:
        """Heads the block has now."""
        return int(self.attn.num_heads)

    def attention_inputs(  # nothing here depends on the position
        self,
        x: Tensor,
        positions: Tensor | None,
        extra: HostArguments,
    ) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D]. torchvision gives its blocks no further arguments."""
        attn = self.attn
        projected = F.linear(self.module.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
        query, key, value = split_heads(projected, attn.num_heads)
        dropout = float(getattr(attn, "dropout", 0)) if attn.training else 0.0
        return AttentionInputs(query, key, value, scale=query.shape[-1] ** -0.5, dropout=dropout)

    def attention_residual(self, x: Tensor, inputs: AttentionInputs, out: Tensor) -> Tensor:
        """x [B N C], out [B H N D] -> [B N C]."""
        return x + self.module.dropout(self.attn.out_proj(join_heads(out)))

    def mlp_residual(self, x: Tensor) -> Tensor:
        """[B N C] -> [B N C]."""
        return x + self.module.mlp(self.module.ln_2(x))

    def costs(self) -> BlockCosts:
        """MACs per token and per pair of tokens."""
        return BlockCosts(
            attention_token=self.attn.in_proj_weight.numel() + linear_macs(self.attn),
            pair=2 * self.attn.out_proj.in_features,
            mlp_token=linear_macs(self.module.mlp),
        )

    def head_parameters(self) -> Sequence[HeadParameter]:
        """Fused Q, K, V rows and projection columns."""
        width = self.attn.in_proj_weight.shape[0] // (3 * self.num_heads)
        fused = [name for name in ("in_proj_weight", "in_proj_bias") if getattr(self.attn, name) is not None]
        return [
            *(HeadParameter(self.attn, name, 0, 3, width) for name in fused),
            HeadParameter(self.attn.out_proj, "weight", 1, 1, width),
        ]

    def set_num_heads(self, count: int) -> None:
        """``embed_dim`` stays: it is the width of the tokens, not of the joined heads."""
        self.attn.num_heads = count


def open_torchvision_vit(model: nn.Module) -> Host | None:
    """Open a VisionTransformer of torchvision; None if it is not one, UnsupportedModelError for other blocks."""
    if not isinstance(model, VisionTransformer):
        return None
    blocks = list(model.encoder.layers.children())
    pairs = [(block, getattr(block, "self_attention", block)) for block in blocks]
    check_blocks(model, pairs, (EncoderBlock,), (nn.MultiheadAttention,))
    side = model.image_size // model.patch_size
    return Host(
        family="torchvision ViT",
        model=model,
        parent=model.encoder,
        attribute="layers",
        blocks=tuple(EncoderBlockView(block) for block in blocks),
        num_prefix=1,
        grid=(side, side),
        image_shape=(_channels(model), model.image_size, model.image_size),
        pools_patches=False,
        discards_patches=True,
        num_classes=model.num_classes,
        architecture=_architecture(model, len(blocks)),
    )


def _channels(model: Any) -> int:
    """Channels of the stem, one convolution or several."""
    convolutions = (module for module in model.conv_proj.modules() if isinstance(module, nn.Conv2d))
    return next(convolutions).in_channels


def _architecture(model: Any, depth: int) -> str:
    """torchvision's own name for this size where it has one."""
    letter = _SIZES.get((depth, model.hidden_dim))
    if letter is None:
        return f"VisionTransformer-{depth}x{model.hidden_dim}-patch{model.patch_size}"
    return f"vit_{letter}_{model.patch_size}"
