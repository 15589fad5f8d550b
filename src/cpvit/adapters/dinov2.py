"""The original code of DINOv2 and DINOv3 (``DinoVisionTransformer``): timm's block with other names, and rotary in 3.

Their modules are never imported here: the class is known by its name. Legend: B images, H heads, N tokens, n patches
alive, N0 patches of the untouched image, D head dimension, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cpvit.adapters.common import split_heads
from cpvit.adapters.host import HeadParameter, Host, UnsupportedModelError
from cpvit.adapters.timm_vit import TimmBlock
from cpvit.attention import AttentionInputs
from cpvit.core import HostArguments

BLOCKS = ("Block", "NestedTensorBlock", "SelfAttentionBlock")
ATTENTIONS = ("Attention", "MemEffAttention", "SelfAttention")
_CLASS = "DinoVisionTransformer"
CODES = {"dinov2": "DINOv2", "dinov3": "DINOv3"}
"""Packages that define it."""


class DinoBlock(TimmBlock):
    """A pre-norm block without norms of query and key."""

    def attention_inputs(self, x: Tensor, positions: Tensor | None, extra: HostArguments) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D], rotated by the rows of ``extra["rope"]`` still alive."""
        attn = self.attn
        query, key, value = split_heads(attn.qkv(self.module.norm1(x)), attn.num_heads)
        rope: Any = extra.get("rope")
        if rope is not None:
            sines_and_cosines = rope[0] if isinstance(rope, list) else rope  # each [N0 D]
            if positions is not None:
                sines_and_cosines = [table[positions].unsqueeze(1) for table in sines_and_cosines]
            query, key = attn.apply_rope(query, key, sines_and_cosines)
        rate = getattr(attn.attn_drop, "p", attn.attn_drop)  # a module in older versions
        dropout = float(rate) if attn.training else 0.0
        return AttentionInputs(query, key, value, scale=query.shape[-1] ** -0.5, dropout=dropout)

    def head_parameters(self) -> Sequence[HeadParameter]:
        """Those of a ViT block, and the mask by which DINOv3 leaves out the bias of the keys."""
        found, qkv = [*super().head_parameters()], self.attn.qkv
        if getattr(qkv, "bias_mask", None) is None:
            return found
        return [*found, HeadParameter(qkv, "bias_mask", 0, 3, qkv.out_features // (3 * self.num_heads))]


def open_dino(model: nn.Module) -> Host | None:
    """Open a DinoVisionTransformer; None if it is not one, UnsupportedModelError for an unknown variant."""
    names = [(kind.__name__, kind.__module__.partition(".")[0]) for kind in type(model).__mro__]
    code = next((CODES[package] for name, package in names if name == _CLASS and package in CODES), "")
    if not code:
        return None
    vit: Any = model
    if vit.chunked_blocks:
        raise UnsupportedModelError(
            f"{_CLASS} has its blocks in chunks; build it with block_chunks=0, as torch.hub does"
        )
    blocks = list(vit.blocks.children())
    for number, block in enumerate(blocks):
        got = (type(block).__name__, type(block.attn).__name__)
        if got[0] not in BLOCKS or got[1] not in ATTENTIONS:
            raise UnsupportedModelError(f"block {number} of {_CLASS} is a {got[0]} with {got[1]}: not known")
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    return Host(
        family=f"{code}, original code",
        model=model,
        parent=model,
        attribute="blocks",
        blocks=tuple(DinoBlock(block) for block in blocks),
        num_prefix=1 + getattr(vit, "num_register_tokens", getattr(vit, "n_storage_tokens", 0)),
        grid=(size[0] // patch[0], size[1] // patch[1]),
        image_shape=(vit.patch_embed.in_chans, int(size[0]), int(size[1])),
        pools_patches=False,
        discards_patches=not isinstance(vit.head, nn.Identity),
        walkers=("get_intermediate_layers",),
        positional=("rope",),
        blocked=_why_blocked,
        num_classes=getattr(vit.head, "out_features", 0),
        architecture=f"{_CLASS}-{len(blocks)}x{vit.embed_dim}-patch{vit.patch_size}",
        resizing="set model.patch_embed.img_size = (height, width) first",
    )


def _why_blocked(host: Host, extra: HostArguments) -> str | None:
    """Their stochastic depth drops whole images of a batch from a block."""
    blocks: list[Any] = [block.module for block in host.blocks]
    for block in blocks:
        if block.training and block.sample_drop_ratio > (0.1 if hasattr(block, "drop_path1") else 0):
            return f"blocks of {host.family} leave out images of a batch while they train (drop_path_rate)"
    return None
