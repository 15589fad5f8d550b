"""open_clip's VisionTransformer, alone or in a two-tower model (then the tower that sees is pruned).

Its blocks are torchvision's with other names and a LayerScale. open_clip itself is never imported here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cpvit.adapters.common import join_heads
from cpvit.adapters.host import Host, UnsupportedModelError
from cpvit.adapters.torchvision_vit import EncoderBlockView
from cpvit.attention import AttentionInputs, replaced
from cpvit.core import HostArguments

BLOCKS = {"ResidualAttentionBlock": "MultiheadAttention", "CustomResidualAttentionBlock": "Attention"}
"""Blocks that are known exactly, and their attention."""

TWO_TOWERS = ("CLIP", "CustomTextCLIP")
WALKERS = ("forward_intermediates",)
FORBIDDEN = ("prune_intermediate_layers",)


class OpenClipBlock(EncoderBlockView):
    """A ``ResidualAttentionBlock`` or a ``CustomResidualAttentionBlock``."""

    def __init__(self, block: Any) -> None:
        self.module = block
        self.attn = block.attn

    def attention_inputs(self, x: Tensor, positions: Tensor | None, extra: HostArguments) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D]; open_clip passes no mask to an image tower."""
        inputs, attn = super().attention_inputs(x, positions, extra), self.attn
        if not hasattr(attn, "ln_q"):
            return inputs
        rate = attn.attn_drop.p if attn.training else 0.0
        return replaced(inputs, query=attn.ln_q(inputs.query), key=attn.ln_k(inputs.key), dropout=rate)

    def attention_residual(self, x: Tensor, inputs: AttentionInputs, out: Tensor) -> Tensor:
        """x [B N C], out [B H N D] -> [B N C]."""
        block, out = self.module, self.attn.out_proj(join_heads(out))
        if hasattr(block, "ln_attn"):
            out = block.ln_attn(self.attn.out_drop(out))
        return x + block.ls_1(out)

    def mlp_residual(self, x: Tensor) -> Tensor:
        """[B N C] -> [B N C]."""
        return x + self.module.ls_2(self.module.mlp(self.module.ln_2(x)))


def open_open_clip(model: nn.Module) -> Host | None:
    """Open an image tower, or a two-tower model, of open_clip; None if it is neither.

    Raises:
        UnsupportedModelError: It is one, but of a kind the cascade does not know.
    """
    kind = type(model)
    if not kind.__module__.startswith("open_clip.") or kind.__name__ not in (
        "VisionTransformer",
        *TWO_TOWERS,
    ):
        return None
    visual: Any = getattr(model, "visual", model)
    if type(visual).__name__ != "VisionTransformer":
        trunk = (
            "prune_(model.visual.trunk, ...)"
            if hasattr(visual, "trunk")
            else "it is not a Vision Transformer"
        )
        raise UnsupportedModelError(f"open_clip's {kind.__name__} sees by a {type(visual).__name__}: {trunk}")
    blocks = list(visual.transformer.resblocks.children())
    for number, block in enumerate(blocks):
        _check_block(block, number)
    channels, (height, width) = visual.conv1.in_channels, visual.image_size
    pools = visual.attn_pool is not None or visual.pool_type != "tok"
    return Host(
        family="open_clip ViT",
        model=model,
        parent=visual.transformer,
        attribute="resblocks",
        blocks=tuple(OpenClipBlock(block) for block in blocks),
        num_prefix=1,
        grid=visual.grid_size,
        image_shape=(channels, height, width),
        pools_patches=pools,
        discards_patches=not pools and not visual.output_tokens,
        pool_token_macs=_pool_token_macs(visual),
        walkers=WALKERS if visual is model else (),
        forbidden=FORBIDDEN if visual is model else (*FORBIDDEN, *WALKERS),
        output=_features,
        blocked=_why_blocked,
        architecture=f"open_clip-{len(blocks)}x{visual.conv1.out_channels}-patch{visual.patch_size[0]}",
    )


def _check_block(block: Any, number: int) -> None:
    attn, kind = block.attn, type(block).__name__
    reason = ""
    if BLOCKS.get(kind) != type(attn).__name__:
        reason = f"is a {kind} with {type(attn).__name__}, which is not known exactly"
    elif getattr(attn, "logit_scale", None) is not None or getattr(attn, "head_scale", None) is not None:
        reason = "scales each head of its attention"
    elif not isinstance(getattr(attn, "ln_inner", nn.Identity()), nn.Identity):
        reason = "normalises the joined heads"
    elif not getattr(attn, "batch_first", True):
        reason = "has its tokens in front of its images (batch_first=False)"
    if reason:
        raise UnsupportedModelError(
            f"open_clip's VisionTransformer cannot be pruned: block {number} {reason}"
        )


def _pool_token_macs(visual: Any) -> int:
    """MACs of the attention pooling per token it reads: keys, values, and attention of its queries."""
    poolers = [visual.attn_pool]
    if getattr(visual, "attn_pool_type", "") == "parallel":
        poolers.append(visual.attn_pool_contrastive)
    found = [
        (pool.attn.embed_dim, pool.attn.kdim, pool.query.shape[0]) for pool in poolers if pool is not None
    ]
    return sum(2 * width * context + 2 * queries * width for width, context, queries in found)


def _features(result: Any) -> Tensor:
    """The image's features from what a tower or a two-tower model returns."""
    if isinstance(result, dict):
        named: Tensor = result["image_features"]
        return named
    features: Tensor = result[0] if isinstance(result, tuple) else result
    return features


def _why_blocked(host: Host, extra: HostArguments) -> str | None:
    """What open_clip does around its blocks, while it trains, that a pruned model cannot."""
    parent: Any = host.parent
    if parent.grad_checkpointing and torch.is_grad_enabled():
        return (
            "open_clip's own gradient checkpointing would run blocks without pruning; switch it off "
            "(model.set_grad_checkpointing(False)) and use prune_(..., checkpointing=True)"
        )
    visual: Any = getattr(host.model, "visual", host.model)
    if visual.training and getattr(visual.patch_dropout, "prob", 0):
        return "open_clip drops random patches while it trains (patch_dropout), before any could be scored"
    return None
