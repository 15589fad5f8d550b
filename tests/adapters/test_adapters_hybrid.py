"""Plain blocks behind a stem that convolves: the blocks are pruned, the stem runs as it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import randomize_
from timm.layers import HybridEmbed
from timm.models import vision_transformer
from torch import nn

from cpvit import PruneConfig, UnsupportedModelError, load_pruned, prune_, save_pruned, unprune_, verify
from cpvit.adapters import open_host
from cpvit.plans.costs import cost_model
from cpvit.plans.macs import count_macs


class Backbone(nn.Conv2d):
    """Stands for a convolutional network in front of the transformer."""

    num_features = 4


def hybrid() -> Any:
    """16 tokens of 4 x 4 features, each of 8 x 8 pixels of an image with 2 channels."""
    model = vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=1,
        in_chans=2,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=7,
        embed_layer=partial(HybridEmbed, backbone=Backbone(2, 4, 8, 8), feature_size=(4, 4)),
    )
    randomize_(model, 0)
    return model.eval()


def test_blocks_behind_a_convolutional_stem_are_pruned_and_restored() -> None:
    model, images = hybrid(), torch.randn(3, 2, 32, 32)
    host = open_host(model)
    assert (host.grid, host.image_shape) == ((4, 4), (2, 32, 32))
    assert verify(model).error < 1e-5
    with torch.no_grad():
        dense, costs = model(images), cost_model(host)
        plan = prune_(model, PruneConfig(keep_per_block=(11, 8, 5)))
        assert count_macs(model) == costs.total(plan.patches_per_block) < costs.dense
        torch.testing.assert_close(model(images[1:2]), model(images)[1:2], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(images), dense, rtol=1e-3, atol=1e-3)
        unprune_(model)
        assert torch.equal(model(images), dense)


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vitamin_small_224"])
def test_a_hybrid_by_name_is_built_again(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, depth=2, num_classes=3).eval()
    prune_(model, PruneConfig(keep_rate=0.5))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(load_pruned(save_pruned(model, tmp_path))(images), model(images))


def test_an_unknown_stem_is_refused() -> None:
    model = hybrid()
    model.patch_embed = nn.Identity()
    with pytest.raises(
        UnsupportedModelError, match=r"with a Identity stem cannot be pruned.*PatchEmbed or HybridEmbed"
    ):
        open_host(model)
