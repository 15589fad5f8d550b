"""Stand-ins with the modules and calling conventions of towers that come as code of their own, not as packages.

Each is of a few lines and says it was defined where the original is, since adapters know such classes by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, DEPTH, PATCH, SIDE = 48, 4, 4, 16, 64


def defined_in(module: str, *kinds: type) -> None:
    for kind in kinds:
        kind.__module__ = module


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class ClipTower(nn.Module):
    """OpenAI's: ``nn.MultiheadAttention`` over [N B C], called through an ``nn.Sequential``."""

    def __init__(self) -> None:
        super().__init__()
        self.input_resolution = SIDE
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(ResidualAttentionBlock() for _ in range(DEPTH)))
        self.proj = nn.Parameter(torch.randn(WIDTH, 8))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = (
            torch.cat([self.class_embedding.expand(x.shape[0], 1, WIDTH), x], dim=1)
            + self.positional_embedding
        )
        x = self.transformer.resblocks(self.ln_pre(x).transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj


class ResidualAttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.ln_1, self.ln_2, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TwoTowers(nn.Module):
    """An image and a text in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = ClipTower()

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.visual(image)


def turned(x: Tensor) -> Tensor:
    """Second half in front, negated: what a rotation mixes the channels with."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def angles_of(tokens: int) -> Tensor:
    """[N D]."""
    steps = torch.arange(tokens)[:, None] * torch.logspace(0, -2, WIDTH // HEADS // 2)
    return torch.cat([steps, steps], dim=1)


def apply_rotary_emb(angles: Tensor, x: Tensor) -> Tensor:
    """The name under which the Perception Encoder's module has its rotation."""
    return x * angles.cos() + turned(x) * angles.sin()


class Rotation:
    """No module: its angles [1 N D] are made when the image is cut into patches, and stay."""

    use_cls_token = True

    def __init__(self) -> None:
        self.freq = torch.empty(0)

    def update_grid(self, tokens: int) -> None:
        self.freq = angles_of(tokens)[None]


class RotaryAttention(nn.Module):
    def __init__(self, rope: Rotation) -> None:
        super().__init__()
        self.num_heads, self.rope = HEADS, rope
        self.in_proj_weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH))
        self.in_proj_bias = nn.Parameter(torch.randn(3 * WIDTH))
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = projected.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        angles = self.rope.freq[:, None]
        query, key = apply_rotary_emb(angles, query), apply_rotary_emb(angles, key)
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class RotaryBlock(nn.Module):
    def __init__(self, rope: Rotation) -> None:
        super().__init__()
        self.attn = RotaryAttention(rope)
        self.ln_1, self.ln_2, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Mlp()
        self.ls_1, self.ls_2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, attn_mask: None = None) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.attn(self.probe.expand(x.shape[0], 1, WIDTH), x, x, need_weights=False)[0]
        return pooled[:, 0]


class PerceptionTower(nn.Module):
    """The Perception Encoder's: rotary, pooled by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.use_cls_token, self.use_rope2d, self.pool_type = SIDE, True, True, "attn"
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.rope = Rotation()
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(RotaryBlock(self.rope) for _ in range(DEPTH))
        self.attn_pool = Pool()

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, WIDTH), x], dim=1)
        self.rope.update_grid(x.shape[1])
        for block in self.transformer.resblocks:
            x = block(x, attn_mask=None)
        return self.attn_pool(x)


class MaskedBias(nn.Linear):
    """A projection that leaves out the bias of the keys."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 3 * WIDTH)
        self.register_buffer("bias_mask", torch.ones(3, WIDTH).index_fill(0, torch.tensor(1), 0).flatten())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = MaskedBias(), nn.Linear(WIDTH, WIDTH)
        self.attn_drop, self.proj_drop = nn.Dropout(0), nn.Dropout(0)

    def apply_rope(self, query: Tensor, key: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        sines, cosines = rope
        prefix = query.shape[2] - sines.shape[-2]
        both = []
        for x in (query, key):
            patches = x[:, :, prefix:]
            both.append(torch.cat([x[:, :, :prefix], patches * cosines + turned(patches) * sines], dim=2))
        return both[0], both[1]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.apply_rope(query, key, rope)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class SelfAttentionBlock(nn.Module):
    """Takes and gives a list of crops, or one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = SelfAttention(), Mlp()
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()
        self.sample_drop_ratio = 0.0

    def one(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Any, rope: Any) -> Any:
        return (
            [self.one(*pair) for pair in zip(x, rope, strict=True)]
            if isinstance(x, list)
            else self.one(x, rope)
        )


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.in_chans = (SIDE, SIDE), (PATCH, PATCH), 3
        self.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


class DinoVisionTransformer(nn.Module):
    """DINOv3's: storage tokens, rotary, crops of several sizes in one list."""

    def __init__(self) -> None:
        super().__init__()
        self.chunked_blocks, self.n_storage_tokens, self.embed_dim, self.patch_size = False, 2, WIDTH, PATCH
        self.patch_embed = Stem()
        self.cls_token = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.blocks = nn.ModuleList(SelfAttentionBlock() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Identity()

    def crops(self, images: list[Tensor]) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        for tokens in map(self.patch_embed, images):
            angles = angles_of(tokens.shape[1]).to(tokens.device)
            yield (
                torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1),
                (angles.sin(), angles.cos()),
            )

    def forward(self, *args: Any) -> Any:
        several = isinstance(args[0], list)
        x, rope = map(list, zip(*self.crops(args[0] if several else [args[0]]), strict=True))
        for block in self.blocks:
            x = block(x, rope)
        classes = [self.norm(tokens)[:, 0] for tokens in x]
        return classes if several else self.head(classes[0])

    def get_intermediate_layers(self, x: Tensor, *, n: int = 1, reshape: bool = False) -> list[Tensor]:
        ((tokens, rope),) = self.crops([x])
        left = []
        for block in self.blocks:
            tokens = block(tokens, rope)
            left.append(tokens[:, 3:])
        return left[-n:]


defined_in("clip.model", ClipTower, TwoTowers, ResidualAttentionBlock)
defined_in("core.vision_encoder.pe", PerceptionTower, RotaryBlock, RotaryAttention)
defined_in("dinov3.models.vision_transformer", DinoVisionTransformer)
ClipTower.__name__ = PerceptionTower.__name__ = "VisionTransformer"
TwoTowers.__name__ = "CLIP"
RotaryBlock.__name__, RotaryAttention.__name__ = "ResidualAttentionBlock", "SelfAttention"
