"""DINOv2's original code under the cascade; needs its repository (facebookresearch/dinov2) on the path."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import cpvit
from cpvit.adapters import UnsupportedModelError, open_host
from cpvit.measure.support import randomize_

pytestmark = pytest.mark.filterwarnings("ignore:xFormers")
dinov2 = pytest.importorskip("dinov2.models.vision_transformer")

SIZE = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 4, "num_heads": 4, "init_values": 1.0}
IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def build(**values: object) -> Any:
    torch.manual_seed(0)
    block = partial(dinov2.Block, attn_class=dinov2.MemEffAttention)
    model = dinov2.DinoVisionTransformer(**{**SIZE, "block_chunks": 0, "block_fn": block, **values})
    randomize_(model)
    return model.eval()


@pytest.mark.parametrize("values", [{}, {"num_register_tokens": 4, "ffn_layer": "swiglu"}])
def test_pruned_and_restored(values: dict[str, object]) -> None:
    model = build(**values)
    with torch.no_grad():
        before = model(IMAGES)
    maps = model.get_intermediate_layers(IMAGES, [1, 3], reshape=True)
    assert cpvit.verify(model).error < 1e-5
    cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=(12, 9, 7, 7)))
    assert [x.shape[1] for x in model.get_intermediate_layers(IMAGES, [1, 3])] == [9, 7]
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=1.0), dense_features=True)
    for got, expected in zip(model.get_intermediate_layers(IMAGES, [1, 3], reshape=True), maps, strict=True):
        torch.testing.assert_close(got, expected)
    cpvit.unprune_(model)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), before)


def test_crops_of_several_sizes_are_refused() -> None:
    model = build()
    cpvit.prune_(model)
    with pytest.raises(ValueError, match="crops of 2 sizes at once"):
        model.forward_features([IMAGES, IMAGES[:, :, :28, :28]], [None, None])


def test_blocks_in_chunks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="block_chunks=0"):
        open_host(build(block_chunks=2))
