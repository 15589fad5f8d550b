"""The VisionTransformer of open_clip, of OpenAI's CLIP and of the Perception Encoder, alone or in a two-tower model.

Of two towers the one that sees is pruned. The blocks are torchvision's with other names and a LayerScale; those of the
Perception Encoder rotate. The three packages are never imported here.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from cpvit.adapters.common import branch, join_heads
from cpvit.adapters.host import Host, UnsupportedModelError
from cpvit.adapters.torchvision_vit import EncoderBlockView
from cpvit.attention import AttentionInputs, replaced
from cpvit.core import HostArguments, with_prefix

BLOCKS = {
    "ResidualAttentionBlock": ("MultiheadAttention", "SelfAttention"),
    "CustomResidualAttentionBlock": ("Attention",),
}
"""Blocks that are known exactly, and their attention."""

CODES = {
    "open_clip.": "open_clip",
    "clip.model": "CLIP, original code",
    "core.vision_encoder.pe": "Perception Encoder, original code",
}
"""Beginnings of the modules that define the classes."""

TWO_TOWERS = ("CLIP", "CustomTextCLIP")
WALKERS = ("forward_intermediates",)
FORBIDDEN = ("prune_intermediate_layers", "truncate")


class OpenClipBlock(EncoderBlockView):
    """A ``ResidualAttentionBlock`` or a ``CustomResidualAttentionBlock``."""

    def __init__(self, block: Any) -> None:
        self.module = block
        self.attn = block.attn

    def attention_inputs(self, x: Tensor, positions: Tensor | None, extra: HostArguments) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D]; open_clip passes no mask to an image tower."""
        inputs, attn = super().attention_inputs(x, positions, extra), self.attn
        if getattr(attn, "rope", None) is not None:
            query, key = _rotated(attn.rope, inputs, positions)
            return replaced(inputs, query=query, key=key)
        if not hasattr(attn, "ln_q"):
            return inputs
        rate = attn.attn_drop.p if attn.training else 0.0
        return replaced(inputs, query=attn.ln_q(inputs.query), key=attn.ln_k(inputs.key), dropout=rate)

    def attention_residual(self, x: Tensor, inputs: AttentionInputs, out: Tensor) -> Tensor:
        """x [B N C], out [B H N D] -> [B N C]."""
        block, out = self.module, self.attn.out_proj(join_heads(out))
        if hasattr(block, "ln_attn"):
            out = block.ln_attn(self.attn.out_drop(out))
        return x + branch(block, 1, out)

    def mlp_residual(self, x: Tensor) -> Tensor:
        """[B N C] -> [B N C]."""
        return x + branch(self.module, 2, self.module.mlp(self.module.ln_2(x)))


def _rotated(rope: Any, inputs: AttentionInputs, positions: Tensor | None) -> list[Tensor]:
    """Query and key [B H N D], rotated by the host's function with the angles of the tokens still alive."""
    rotate, angles = sys.modules[type(rope).__module__].apply_rotary_emb, rope.freq  # [1 P+N0 D]
    if positions is not None:
        angles = angles[0][with_prefix(positions, int(rope.use_cls_token))]
    return [rotate(angles.unsqueeze(1), x) for x in (inputs.query, inputs.key)]


def open_open_clip(model: nn.Module) -> Host | None:
    """Open an image tower or a two-tower model; None if it is neither, UnsupportedModelError for an unknown variant."""
    kind = type(model)
    code = next((title for start, title in CODES.items() if kind.__module__.startswith(start)), "")
    if not code or kind.__name__ not in ("VisionTransformer", *TWO_TOWERS):
        return None
    visual: Any = getattr(model, "visual", model)
    if type(visual).__name__ != "VisionTransformer":
        way = "prune_(model.visual.trunk, ...)" if hasattr(visual, "trunk") else "no Vision Transformer"
        raise UnsupportedModelError(f"{kind.__name__} ({code}) sees by a {type(visual).__name__}: {way}")
    if visual is not model and code.startswith("CLIP"):
        raise UnsupportedModelError(f"{kind.__name__} ({code}) needs a text too: prune_(model.visual, ...)")
    blocks = list(visual.transformer.resblocks.children())
    for number, block in enumerate(blocks):
        _check_block(block, f"{code.split(',')[0]}'s VisionTransformer cannot be pruned: block {number}")
    size = getattr(visual, "image_size", None) or visual.input_resolution
    size, patch = (size, size) if isinstance(size, int) else size, visual.conv1.kernel_size
    pool = getattr(visual, "attn_pool", None)
    pools = pool is not None or getattr(visual, "pool_type", "tok") != "tok"
    tokens_first = not getattr(blocks[0].attn, "batch_first", True)
    walkers = WALKERS if hasattr(model, WALKERS[0]) and visual is model and not tokens_first else ()
    forbidden = {name for name in (*WALKERS, *FORBIDDEN) if hasattr(model, name)} - {*walkers}
    return Host(
        family=code if "," in code else f"{code} ViT",
        model=model,
        parent=visual.transformer,
        attribute="resblocks",
        blocks=tuple(OpenClipBlock(block) for block in blocks),
        num_prefix=int(getattr(visual, "use_cls_token", True)),
        grid=(size[0] // patch[0], size[1] // patch[1]),
        image_shape=(visual.conv1.in_channels, *size),
        pools_patches=pools,
        discards_patches=not pools and not getattr(visual, "output_tokens", False),
        tokens_first=tokens_first,
        pool_token_macs=0 if pool is None else _pool_token_macs(visual),
        walkers=walkers,
        forbidden=tuple(sorted(forbidden)),
        output=_features,
        reads_values=bool(
            getattr(visual, "use_rope2d", False)
        ),  # its angles are no buffer, and stay where they are
        blocked=_why_blocked,
        architecture=f"{code.split(',')[0]}-{len(blocks)}x{visual.conv1.out_channels}-patch{patch[0]}",
    )


def _check_block(block: Any, place: str) -> None:
    attn, kind = block.attn, type(block).__name__
    reason = ""
    if type(attn).__name__ not in BLOCKS.get(kind, ()):
        reason = f"is a {kind} with {type(attn).__name__}, which is not known exactly"
    elif getattr(attn, "logit_scale", None) is not None or getattr(attn, "head_scale", None) is not None:
        reason = "scales each head of its attention"
    elif not isinstance(getattr(attn, "ln_inner", nn.Identity()), nn.Identity):
        reason = "normalises the joined heads"
    if reason:
        raise UnsupportedModelError(f"{place} {reason}")


def _pool_token_macs(visual: Any) -> int:
    """MACs of the attention pooling per token it reads: keys, values, and attention of its queries."""
    poolers = [visual.attn_pool]
    if getattr(visual, "attn_pool_type", "") == "parallel":
        poolers.append(visual.attn_pool_contrastive)
    queries = (pool.query if hasattr(pool, "query") else pool.probe[0] for pool in poolers)
    pairs = zip((pool.attn for pool in poolers), queries, strict=True)
    return sum(2 * attn.embed_dim * (attn.kdim + len(query)) for attn, query in pairs)


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
    if getattr(parent, "grad_checkpointing", False) and torch.is_grad_enabled():
        return (
            f"{host.name.split('-')[0]}'s own gradient checkpointing would run blocks without pruning; switch it off "
            "(model.set_grad_checkpointing(False)) and use prune_(..., checkpointing=True)"
        )
    visual: Any = getattr(host.model, "visual", host.model)
    if visual.training and getattr(getattr(visual, "patch_dropout", None), "prob", 0):
        return "open_clip drops random patches while it trains (patch_dropout), before any could be scored"
    return None
