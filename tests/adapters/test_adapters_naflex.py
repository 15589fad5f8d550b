"""timm's NaFlexVit under the cascade: images of one size; patches with coordinates and masks are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import needs
from torch import Tensor

import cpvit
from cpvit.adapters import open_host
from cpvit.measure.support import check_compile, check_export, randomize_
from cpvit.plans.macs import count_macs
from cpvit.weights.saving import load_pruned, save_pruned

NAMES = (
    "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_parfac_gap",
    "naflexvit_so400m_patch16_siglip",
    "naflexvit_base_patch16_radio_v3",
)
CLASSIC = ("vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_base_patch16_rope_mixed_224")
"""Built as a NaFlexVit: EVA's blocks, one rotary embedding or one for each block."""
SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 4}
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


YOUNG = ("naflexvit_base_patch16_radio_v3", "vit_small_patch16_dinov3")
"""Which older releases of timm do not build."""


def build(name: str) -> Any:
    if name in YOUNG:
        needs("timm", "1.0.31")
    torch.manual_seed(0)
    if name in CLASSIC:
        model = timm.create_model(name, **SMALL, img_size=64, use_naflex=True)
    else:
        model = timm.create_model(name, **SMALL, pos_embed_grid_size=(4, 4))
        model.pretrained_cfg["input_size"] = (3, 64, 64)
    randomize_(model)
    return model.eval()


def output(model: Any, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(images)
    return found


@pytest.mark.parametrize("name", [*NAMES, *CLASSIC])
def test_pruned_counted_and_restored(name: str) -> None:
    model = build(name)
    before, dense = output(model), count_macs(model)
    assert cpvit.verify(model).error < 1e-5
    for method in ("cpvit", "cpvit-merge"):
        cpvit.prune_(model, cpvit.PruneConfig(method=method, macs=0.8))
        assert count_macs(model) / dense == pytest.approx(0.8, abs=0.01)
        pruned = output(model)
        torch.testing.assert_close(output(model, IMAGES[1:2]), pruned[1:2], rtol=1e-4, atol=1e-5)
    cpvit.unprune_(model)
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("name", [NAMES[2], CLASSIC[1]])
def test_compiled_exported_saved(name: str, tmp_path: Path) -> None:
    model = build(name)
    cpvit.prune_(model, cpvit.PruneConfig(macs=0.8, head_keep_rate=0.5), calibration=IMAGES)
    host = open_host(model)
    check_compile(host, IMAGES)
    check_export(host, IMAGES)
    arguments = {"use_naflex": True} if name in CLASSIC else {"pos_embed_grid_size": (4, 4)}
    save_pruned(model, tmp_path / "saved", arguments=arguments)
    assert torch.equal(output(load_pruned(tmp_path / "saved")), output(model))


def padded() -> dict[str, Tensor]:
    """An image of 4 x 4 patches and one of 2 x 4, filled up."""
    coordinates = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, 16, 2)
    valid = torch.arange(16) < torch.tensor([[16], [8]])
    return {"patches": torch.randn(2, 16, 768), "patch_coord": coordinates, "patch_valid": valid}


@pytest.mark.parametrize("name", [NAMES[0], CLASSIC[1]])
def test_padded_patches_are_refused_by_name(name: str) -> None:
    model = build(name)
    if name in CLASSIC:  # whose images are cut by a convolution
        model.embeds.proj, model.embeds.is_linear = torch.nn.Linear(768, 48), True
    assert output(model, padded()).shape[0] == 2  # type: ignore[arg-type]
    cpvit.prune_(model, verify=False)
    with pytest.raises(
        cpvit.PruningBypassError, match=r"patch_coord, patch_valid, attn_mask.*images \[B C H W\]"
    ):
        model(padded())


def test_another_size_is_taken_once_it_is_set() -> None:
    model = build(NAMES[0])
    cpvit.prune_(model)
    wide = torch.randn(2, 3, 32, 128)
    with pytest.raises(ValueError, match=r"4x4.* got 10"):
        model(torch.randn(2, 3, 32, 80))
    cpvit.unprune_(model)
    model.pretrained_cfg["input_size"] = (3, 32, 128)
    assert cpvit.verify(model).error < 1e-5
    cpvit.prune_(model, cpvit.PruneConfig(macs=0.6))
    assert open_host(model).grid == (2, 8)
    assert output(model, wide).isfinite().all()


def test_inner_blocks_give_fewer_and_fewer_tokens() -> None:
    model = build(NAMES[0])
    cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=(12, 9, 7, 7)))
    inner = model.forward_intermediates(IMAGES, output_fmt="NLC", intermediates_only=True)
    assert [tokens.shape[1] for tokens in inner] == [12, 9, 7, 7]
