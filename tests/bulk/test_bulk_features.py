"""Features of the other libraries' models: hooks see what each of them computes by itself."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from cpvit.adapters import open_host
from cpvit.bulk.features import FeatureReader, Kind, Tokens
from cpvit.plans.config import PruneConfig
from cpvit.pruning.prune import prune_host

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
MERGED = PruneConfig(method="cpvit-merge", keep_per_block=(12, 9, 6))


def taken(model: Any, kind: Kind, config: PruneConfig | None = None) -> Any:
    host = open_host(model.eval())
    if config is not None:
        prune_host(host, config)
    reader = FeatureReader(host, kind)
    with torch.inference_mode():
        model(IMAGES)
    return reader.take()


def test_torchvision() -> None:
    vit = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    model = vit.VisionTransformer(64, 16, 3, 2, 32, 64, num_classes=7).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    seen: list[Tensor] = []
    model.encoder.ln.register_forward_hook(lambda module, inputs, output: seen.append(output))
    tokens = taken(model, "tokens")
    torch.testing.assert_close(tokens.values, seen[0])
    torch.testing.assert_close(taken(model, "class"), seen[0][:, 0])
    torch.testing.assert_close(taken(model, "pooled"), seen[0][:, 0])
    torch.testing.assert_close(taken(model, "mean"), seen[0][:, 1:].mean(1))


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2ForImageClassification", "Dinov2Model"])
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    family = "Dinov2" if name.startswith("Dinov2") else "ViT"
    config = getattr(transformers, f"{family}Config")(**options, num_labels=7)
    model = getattr(transformers, name)(config).eval()
    with torch.inference_mode():
        inner = getattr(model, model.base_model_prefix, model)
        expected = inner(IMAGES).last_hidden_state
    torch.testing.assert_close(taken(model, "tokens").values, expected)
    torch.testing.assert_close(taken(model, "class"), expected[:, 0])
    pooled = {
        "ViTForImageClassification": expected[:, 0],
        "Dinov2ForImageClassification": torch.cat([expected[:, 0], expected[:, 1:].mean(1)], dim=1),
        "Dinov2Model": expected[:, 0],
    }[name]
    torch.testing.assert_close(taken(model, "pooled"), pooled)


@pytest.mark.parametrize("pooling", ["token", "avg", "map"])
def test_merged_tokens_keep_their_own_positions(pooling: str) -> None:
    """Also where the model gets them spread out over the grid, since its head reads patches."""
    torch.manual_seed(0)
    options = {"global_pool": pooling, "class_token": pooling != "map", "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, **options)
    found = taken(model, "tokens", MERGED)
    assert isinstance(found, Tokens)
    prefix = model.num_prefix_tokens
    assert found.values.shape == (2, 6 + prefix, 192)
    assert found.sizes[:, prefix:].sum(1).tolist() == [16, 16]
    whole = taken(model, "mean")
    weights = found.sizes[:, prefix:, None]
    torch.testing.assert_close((found.values[:, prefix:] * weights).sum(1) / 16, whole)


def test_two_heads_are_averaged() -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=2, num_classes=7).eval()
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    torch.testing.assert_close(taken(model, "pooled"), expected)


def test_a_pooling_that_is_not_known_is_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=7)
    model.head = torch.nn.Sequential(model.head, torch.nn.Tanh())
    with pytest.raises(
        ValueError, match="pools in a way that is not known; use --features class, mean or tokens"
    ):
        taken(model, "pooled")
