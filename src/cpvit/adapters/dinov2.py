"""DINOv2's original code (``DinoVisionTransformer``, from torch.hub or its repository): timm's block with other names.

Its module is never imported here: the class is known by its name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cpvit.adapters.common import split_heads
from cpvit.adapters.host import Host, UnsupportedModelError
from cpvit.adapters.timm_vit import TimmBlock
from cpvit.attention import AttentionInputs
from cpvit.core import HostArguments

BLOCKS, ATTENTIONS = ("Block", "NestedTensorBlock"), ("Attention", "MemEffAttention")


class Dinov2Block(TimmBlock):
    """A pre-norm block without norms of query and key."""

    def attention_inputs(self, x: Tensor, positions: Tensor | None, extra: HostArguments) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D]."""
        attn = self.attn
        query, key, value = split_heads(attn.qkv(self.module.norm1(x)), attn.num_heads)
        rate = getattr(attn.attn_drop, "p", attn.attn_drop)  # a module in older versions
        dropout = float(rate) if attn.training else 0.0
        return AttentionInputs(query, key, value, scale=query.shape[-1] ** -0.5, dropout=dropout)


def open_dinov2(model: nn.Module) -> Host | None:
    """Open a DinoVisionTransformer; None if the model is not one.

    Raises:
        UnsupportedModelError: It is one, but of a variant the cascade does not know.
    """
    names = [(kind.__name__, kind.__module__.partition(".")[0]) for kind in type(model).__mro__]
    if ("DinoVisionTransformer", "dinov2") not in names:
        return None
    vit: Any = model
    if vit.chunked_blocks:
        raise UnsupportedModelError(
            "DinoVisionTransformer has its blocks in chunks; build it with block_chunks=0, as torch.hub does"
        )
    blocks = list(vit.blocks.children())
    for number, block in enumerate(blocks):
        got = (type(block).__name__, type(block.attn).__name__)
        if got[0] not in BLOCKS or got[1] not in ATTENTIONS:
            raise UnsupportedModelError(
                f"block {number} of DinoVisionTransformer is a {got[0]} with {got[1]}: not known"
            )
    rows, columns = (
        size // patch for size, patch in zip(_size(vit), vit.patch_embed.patch_size, strict=True)
    )
    return Host(
        family="DINOv2, original code",
        model=model,
        parent=model,
        attribute="blocks",
        blocks=tuple(Dinov2Block(block) for block in blocks),
        num_prefix=1 + vit.num_register_tokens,
        grid=(rows, columns),
        image_shape=(vit.patch_embed.in_chans, *_size(vit)),
        pools_patches=False,
        discards_patches=not isinstance(vit.head, nn.Identity),
        walkers=("get_intermediate_layers",),
        blocked=_why_blocked,
        num_classes=getattr(vit.head, "out_features", 0),
        architecture=f"DinoVisionTransformer-{len(blocks)}x{vit.embed_dim}-patch{vit.patch_size}",
        resizing="set model.patch_embed.img_size = (height, width) first",
    )


def _size(vit: Any) -> tuple[int, int]:
    return int(vit.patch_embed.img_size[0]), int(vit.patch_embed.img_size[1])


def _why_blocked(host: Host, extra: HostArguments) -> str | None:
    """Its stochastic depth drops whole images of a batch from a block."""
    blocks: list[Any] = [block.module for block in host.blocks]
    if any(block.training and block.sample_drop_ratio > 0.1 for block in blocks):
        return "DINOv2's blocks leave out images of a batch while they train (drop_path_rate above 0.1)"
    return None
