"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, rotary ViTs and everything else built on that class.

The host computes its rotary embedding once for the whole grid and hands it to every block; once patches have
left, the rows of the survivors are gathered from it. Legend: B images, H heads, N tokens, P prefix tokens,
n patches alive, N0 patches of the untouched image, D head dimension, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from timm.models import eva, naflexvit
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from cpvit.adapters.common import (
    HostModule,
    bias_heads,
    check_parts,
    dropout_of,
    fused_qkv,
    gate_of,
    heads_first,
    linear_heads,
    random_patches,
    refuse_inner_norm,
    refuse_masks,
    split_heads,
    timm_host,
)
from cpvit.adapters.host import HeadParameter, Host, UnsupportedModelError
from cpvit.adapters.timm_vit import TimmBlock
from cpvit.attention import AttentionInputs
from cpvit.core import HostArguments

BLOCKS = (eva.EvaBlock, eva.EvaBlockPostNorm)
# AttentionRope came later than the oldest timm that is supported.
ATTENTIONS = (eva.EvaAttention, getattr(eva, "AttentionRope", eva.EvaAttention))

SET_INPUT_SIZE = 'set model.pretrained_cfg["input_size"] = (channels, height, width) first'


class EvaBlock(TimmBlock):
    """A pre-norm ``EvaBlock`` or an ``EvaBlockPostNorm``."""

    def __init__(self, block: HostModule, *, rope_per_head: bool) -> None:
        super().__init__(block)
        self.post_norm = isinstance(block, eva.EvaBlockPostNorm)
        self.rope_per_head = rope_per_head

    def attention_inputs(self, x: Tensor, positions: Tensor | None, extra: HostArguments) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D], rotated by the rows of ``extra["rope"]`` still alive."""
        refuse_masks({name: value for name, value in extra.items() if name != "rope"})
        attn = self.attn
        x = x if self.post_norm else self.module.norm1(x)
        query, key, value = self._project(x)
        rope = extra.get("rope")
        if isinstance(rope, Tensor):
            rope = rope if positions is None else rope_rows(rope, positions)
            query, key = rotate(attn, query, rope, value), rotate(attn, key, rope, value)
        groups = getattr(attn, "num_kv_groups", 1)
        return AttentionInputs(
            query=query,
            key=key if groups == 1 else key.repeat_interleave(groups, dim=1),
            value=value if groups == 1 else value.repeat_interleave(groups, dim=1),
            scale=attn.scale,
            gate=gate_of(attn, x),
            dropout=dropout_of(attn),
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B N C] -> query [B H N D], key and value [B G N D]; G < H where heads share keys and values."""
        attn = self.attn
        if attn.qkv is not None:
            query, key, value = split_heads(fused_qkv(attn, x), attn.num_heads)
        else:
            shared = getattr(attn, "num_kv_heads", attn.num_heads)
            query = heads_first(attn.q_proj(x), attn.num_heads)
            key, value = heads_first(attn.k_proj(x), shared), heads_first(attn.v_proj(x), shared)
        if hasattr(attn, "q_norm"):
            query, key = attn.q_norm(query), attn.k_norm(key)
        return query, key, value

    def head_parameters(self) -> Sequence[HeadParameter]:
        """Rows of the Q, K, V (and gate) projections and their biases, columns of the output projection."""
        self._check_heads()
        attn = self.attn
        width = attn.proj.in_features // attn.num_heads
        found = [HeadParameter(attn.proj, "weight", 1, 1, width), *bias_heads(attn, width)]
        for linear, groups in ((attn.qkv, 3), (attn.q_proj, 1), (attn.k_proj, 1), (attn.v_proj, 1)):
            found += [] if linear is None else linear_heads(linear, 0, groups, width)
        gate = getattr(attn, "gate", None)
        return found if gate is None else found + linear_heads(gate, 0, 1, width)

    def _check_heads(self) -> None:
        refuse_inner_norm(self.attn)
        if getattr(self.attn, "num_kv_groups", 1) > 1:
            raise UnsupportedModelError(
                "heads cannot be pruned in this model: groups of its heads share keys and values "
                "(grouped-query attention); prune patches only (head_keep_rate=1)"
            )
        if self.rope_per_head:
            raise UnsupportedModelError(
                "heads cannot be pruned in this model: its rotary embedding is learned for each head and "
                "lies outside the blocks (mixed rope); prune patches only (head_keep_rate=1)"
            )

    def set_num_heads(self, count: int) -> None:
        """timm reads the counts (and, for AttentionRope, the joined widths) from the attention module."""
        attn = self.attn
        attn.num_heads = count
        for name in ("attn_dim", "kv_dim"):
            if name in vars(attn):
                setattr(attn, name, count * attn.head_dim)
        if "num_kv_heads" in vars(attn):
            attn.num_kv_heads = count


def rope_rows(rope: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of the surviving patches.

    Args:
        rope: [N0 R], or one per head [H N0 R]; R holds sines and cosines.
        positions: [B n].

    Returns:
        [B 1 n R] or [B H n R], which broadcasts over query and key.
    """
    if rope.dim() == 2:
        return rope[positions].unsqueeze(1)
    return rope[:, positions].transpose(0, 1)


def rotate(attn: HostModule, x: Tensor, rope: Tensor, like: Tensor) -> Tensor:
    """Rotate the patches of a query or key [B H N D], not its prefix; the result has ``like``'s dtype."""
    prefix = attn.num_prefix_tokens
    layout: dict[str, Any] = {"half": attn.rotate_half} if hasattr(attn, "rotate_half") else {}
    patches = apply_rot_embed_cat(x[:, :, prefix:], rope, **layout)
    return torch.cat([x[:, :, :prefix], patches], dim=2).type_as(like)


def open_timm_eva(model: nn.Module) -> Host | None:
    """Open a model of timm's Eva class; None if it is not one, UnsupportedModelError for an unknown variant."""
    if not isinstance(model, eva.Eva):
        return None
    check_parts(model, BLOCKS, ATTENTIONS)
    rope_per_head = bool(getattr(model, "rope_mixed", False))
    blocks = [EvaBlock(block, rope_per_head=rope_per_head) for block in model.blocks.children()]
    return timm_host(
        model, "timm EVA", blocks, blocked=random_patches, positional=("rope", "attn_mask", "is_causal")
    )


def open_timm_naflex(model: nn.Module) -> Host | None:
    """Open a NaFlexVit for images [B C H W] of one size; None, or UnsupportedModelError, as :func:`open_timm_eva`."""
    if not isinstance(model, naflexvit.NaFlexVit):
        return None
    check_parts(model, (vit.Block, *BLOCKS), (vit.Attention, *ATTENTIONS))
    blocks = [
        EvaBlock(block, rope_per_head=model.rope_is_mixed) if isinstance(block, BLOCKS) else TimmBlock(block)
        for block in model.blocks.children()
    ]
    resizing = "" if model.embeds.default_img_size else SET_INPUT_SIZE
    return timm_host(model, "timm NaFlexViT", blocks, blocked=_mixes_sizes, resizing=resizing)


def _mixes_sizes(host: Host, extra: HostArguments) -> str | None:
    """Padded patches must not be scored, matched or counted; here none of an image is padding."""
    rope = extra.get("rope")
    if extra.get("attn_mask") is None and not (isinstance(rope, Tensor) and rope.dim() == 4):
        return random_patches(host, extra)
    return (
        f"{host.name} was given patches with coordinates (patch_coord, patch_valid, attn_mask), of images of several "
        "sizes and padded; pruned, it takes images [B C H W] of one size"
    )
