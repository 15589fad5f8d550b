"""What the adapters of timm's families share.

Legend: B images, H heads, N tokens, P prefix tokens, n patches alive (N = P + n), D head dimension,
C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from timm.layers import AttentionPoolLatent, HybridEmbed, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from cpvit.adapters.host import HeadParameter, Host, HostBlock, UnsupportedModelError
from cpvit.attention import AttentionInputs
from cpvit.core import HostArguments, with_prefix

HostModule: TypeAlias = Any
"""A module of timm's: an ``nn.Module`` whose attributes carry no types."""

WALKERS = ("forward_intermediates", "get_intermediate_layers")
"""Methods of timm's models that return what leaves inner blocks."""

FORBIDDEN = ("prune_intermediate_layers",)
"""Methods of timm's models that take blocks out."""

BRANCH = ("ls{}", "ls_{}", "gamma_{}", "drop_path{}")
"""Parts of a block behind its attention (1) and its MLP (2), in order; a block has those of its library."""

SHARED_BIAS = (
    "heads cannot be pruned in this model: all blocks share one relative position bias per head, so that a "
    "head cannot be cut out of a single block; prune patches only (head_keep_rate=1)"
)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B N 3*H*D] -> three of [B H N D]."""
    batch, tokens, _ = qkv.shape
    query, key, value = qkv.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def heads_first(projected: Tensor, heads: int) -> Tensor:
    """[B N H*D] -> [B H N D]."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(out: Tensor) -> Tensor:
    """[B H N D] -> [B N H*D]."""
    return out.transpose(1, 2).flatten(2)


def fused_qkv(attn: HostModule, x: Tensor) -> Tensor:
    """Fused projection, with the three bias vectors some families keep apart: [B N C] -> [B N 3*H*D]."""
    if getattr(attn, "q_bias", None) is None:
        projected: Tensor = attn.qkv(x)
        return projected
    bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    if getattr(attn, "qkv_bias_separate", False):
        # The host rounds the product before it adds the bias, which shows in half precision.
        return attn.qkv(x) + bias
    return F.linear(x, attn.qkv.weight, bias)


def project_out(attn: HostModule, inputs: AttentionInputs, out: Tensor) -> Tensor:
    """What follows the attention inside the host's module: out [B H N D] -> [B N C]."""
    joined = join_heads(out)
    norm = getattr(attn, "norm", None)
    joined = joined if norm is None else norm(joined)
    joined = joined if inputs.gate is None else joined * inputs.gate
    projected: Tensor = attn.proj_drop(attn.proj(joined))
    return projected


def gate_of(attn: HostModule, x: Tensor) -> Tensor | None:
    """What the attention output is multiplied with, where the host has a gate: [B N C] -> [B N H*D]."""
    gate = getattr(attn, "gate", None)
    return None if gate is None else gate(x).sigmoid()


def dropout_of(attn: HostModule) -> float:
    """Probability of dropping an attention weight now."""
    return float(attn.attn_drop.p) if attn.training else 0.0


def branch(block: HostModule, number: int, x: Tensor) -> Tensor:
    """What follows attention (1) or MLP (2) up to the residual: LayerScale, a module or a factor, and DropPath."""
    for name in BRANCH:
        found = getattr(block, name.format(number), None)
        if found is not None:
            x = found(x) if isinstance(found, nn.Module) else found * x
    return x


def pair_index(positions: Tensor, num_prefix: int, num_tokens: int) -> Tensor:
    """Where the pairs of surviving tokens lie in a flattened N x N matrix: [B n] -> [B (P+n)*(P+n)]."""
    rows = with_prefix(positions, num_prefix)
    return (rows[:, :, None] * num_tokens + rows[:, None, :]).flatten(1)


def look_up(values: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Per-head values [H R] at the flattened pairs [B N*N] of ``tokens`` = N tokens -> [B H N N]."""
    batch, heads = index.shape[0], values.shape[0]
    index = index[:, None, :].expand(batch, heads, index.shape[1])
    return values.expand(batch, *values.shape).gather(2, index).view(batch, heads, tokens, tokens)


def linear_macs(module: nn.Module) -> int:
    """MACs per token of every linear layer inside: the number of their weights."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def linear_heads(linear: nn.Linear, dim: int, groups: int, width: int) -> list[HeadParameter]:
    """Weight, and bias if any, of a linear layer whose outputs are heads."""
    found = [HeadParameter(linear, "weight", dim, groups, width)]
    return found if linear.bias is None else [*found, HeadParameter(linear, "bias", dim, groups, width)]


def bias_heads(attn: HostModule, width: int) -> list[HeadParameter]:
    """The three bias vectors, a parameter, a buffer, a parameter, of families that keep them apart."""
    if getattr(attn, "q_bias", None) is None:
        return []
    return [HeadParameter(attn, name, 0, 1, width) for name in ("q_bias", "k_bias", "v_bias")]


def refuse_inner_norm(attn: HostModule) -> None:
    """A norm over the joined heads mixes them.

    Raises:
        UnsupportedModelError: There is one.
    """
    if isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        return
    raise UnsupportedModelError(
        "heads cannot be pruned in this model: its attention normalises the joined heads (scale norm), "
        "so that removing one changes all others; prune patches only (head_keep_rate=1)"
    )


def pools_patches(model: HostModule) -> bool:
    """Whether the head reads patches; with "" timm returns all tokens unpooled."""
    return model.global_pool not in ("", "token")


def discards_patches(model: HostModule) -> bool:
    """Whether the output is made from prefix tokens alone."""
    return bool(model.global_pool == "token")


def pool_token_macs(pool: nn.Module | None) -> int:
    """MACs of timm's latent attention pooling per token it reads: keys, values, and their attention."""
    if pool is None:
        return 0
    if not isinstance(pool, AttentionPoolLatent):
        raise UnsupportedModelError(f"attention pooling by {type(pool).__name__} is not known to cpvit")
    return int(pool.kv.weight.numel() + 2 * pool.latent_len * pool.kv.out_features // 2)


def refuse_masks(extra: HostArguments) -> None:
    """A mask over the full sequence has no meaning once patches have left."""
    given = [name for name, value in extra.items() if value is not None and value is not False]
    if given:
        raise ValueError(
            f"a pruned model cannot take {', '.join(given)}: it speaks of patches that may have left"
        )


def random_patches(host: Host, extra: HostArguments) -> str | None:
    """Why a model that drops random patches while it trains cannot be pruned meanwhile; None if it does not."""
    dropout = getattr(host.model, "patch_drop", None)
    if not host.model.training or not getattr(dropout, "prob", 0):
        return None
    return (
        f"{host.name} drops random patches while it trains (patch_drop_rate), before any could be scored; "
        "set model.patch_drop.prob = 0"
    )


def timm_host(model: HostModule, family: str, blocks: Sequence[HostBlock], **more: Any) -> Host:
    """What timm's families have in common, and ``more`` fields of the host."""
    return Host(
        family=family,
        model=model,
        parent=model,
        attribute="blocks",
        blocks=tuple(blocks),
        num_prefix=model.num_prefix_tokens,
        grid=grid_of(model),
        image_shape=image_shape(model),
        pools_patches=pools_patches(model),
        discards_patches=discards_patches(model),
        pool_token_macs=pool_token_macs(getattr(model, "attn_pool", None)),
        walkers=WALKERS,
        forbidden=FORBIDDEN,
        head="forward_head",
        num_classes=model.num_classes,
        **more,
    )


def check_parts(model: HostModule, blocks: Sequence[type], attentions: Sequence[type]) -> None:
    """Raise UnsupportedModelError unless the stem, every block and its attention are of classes known exactly."""
    stem = getattr(model, "patch_embed", None)
    if stem is not None and not isinstance(stem, (PatchEmbed, HybridEmbed)):
        raise UnsupportedModelError(
            f"{type(model).__name__} with a {type(stem).__name__} stem cannot be pruned: "
            "only stems that end in one grid of patches are known (timm's PatchEmbed or HybridEmbed)"
        )
    pairs = [(block, getattr(block, "attn", block)) for block in model.blocks.children()]
    check_blocks(model, pairs, blocks, attentions)


def check_blocks(
    model: nn.Module,
    found: Sequence[tuple[nn.Module, nn.Module]],
    blocks: Sequence[type],
    attentions: Sequence[type],
) -> None:
    """Raise UnsupportedModelError unless every block, and its attention, is of a class known exactly."""
    for number, (block, attention) in enumerate(found):
        place = f"block {number} of {type(model).__name__}"
        if type(block) not in blocks:
            raise UnsupportedModelError(
                f"{place} is a {type(block).__name__}, which cannot be pruned: attention and MLP must follow "
                f"one another (in a {_names(blocks)})"
            )
        if type(attention) not in attentions:
            raise UnsupportedModelError(
                f"{place} uses {type(attention).__name__}, which cannot be pruned: only {_names(attentions)} "
                "is known exactly"
            )


def _names(classes: Sequence[type]) -> str:
    return " or ".join(known.__name__ for known in classes)


def image_shape(model: HostModule) -> tuple[int, int, int]:
    """Channels, height and width the model was made for; of a NaFlexVit, which takes any, those of its weights."""
    if (stem := getattr(model, "embeds", None)) is not None:
        weights = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (0, 0, 0))[1:]
        sides = [
            count * patch for count, patch in zip(stem.pos_embed_grid_size, stem.patch_size, strict=True)
        ]
        height, width = stem.default_img_size or (weights if all(weights) else sides)
        return stem.in_chans, int(height), int(width)
    stem = model.patch_embed
    height, width = stem.img_size
    channels = next(layer.in_channels for layer in stem.modules() if isinstance(layer, nn.Conv2d))
    return channels, int(height), int(width)


def grid_of(model: HostModule) -> tuple[int, int]:
    """Patch rows and columns."""
    if (stem := getattr(model, "embeds", None)) is not None:
        rows, columns = stem.dynamic_feat_size(image_shape(model)[1:])
    else:
        rows, columns = model.patch_embed.grid_size
    return int(rows), int(columns)
