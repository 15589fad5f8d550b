"""OpenAI's CLIP, DINOv3 and the Perception Encoder as their authors wrote them: the originals if they are on the
path, and stand-ins in any case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import original_code
import pytest
import torch
from torch import Tensor, nn

import cpvit
from cpvit.adapters import UnsupportedModelError, open_host
from cpvit.measure.support import check_compile, check_export, randomize_
from cpvit.plans.macs import count_macs
from cpvit.weights.saving import load_pruned, save_pruned

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def original(module: str, kind: str, *args: object, **values: object) -> Callable[[], Any]:
    def build() -> Any:
        return getattr(pytest.importorskip(module), kind)(*args, **values)

    return build


DINOV3 = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 4}
PERCEPTION = {"image_size": 64, "output_dim": 8, "attn_pooler_heads": 4}
TOWERS: dict[str, Callable[[], Any]] = {
    "CLIP stand-in": original_code.ClipTower,
    "DINOv3 stand-in": original_code.DinoVisionTransformer,
    "Perception Encoder stand-in": original_code.PerceptionTower,
    "CLIP": original("clip.model", "VisionTransformer", 64, 16, 48, 4, 4, 8),
    "DINOv3": original("dinov3.models.vision_transformer", "DinoVisionTransformer", **DINOV3),
    "DINOv3, as released": original(
        "dinov3.models.vision_transformer",
        "DinoVisionTransformer",
        **DINOV3,
        n_storage_tokens=4,
        layerscale_init=1e-5,
        mask_k_bias=True,
        ffn_layer="swiglu",
        untie_cls_and_patch_norms=True,
    ),
    "PE core": original(
        "core.vision_encoder.pe", "VisionTransformer", 16, 48, 4, 4, 2.0, **PERCEPTION, use_cls_token=True
    ),
    "PE spatial": original(
        "core.vision_encoder.pe",
        "VisionTransformer",
        *(16, 48, 4, 4, 2.0),
        **PERCEPTION,
        pool_type="none",
        ls_init_value=0.1,
    ),
}


def build(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = TOWERS[name]()
    if hasattr(model, "init_weights"):
        model.init_weights()
    randomize_(model)
    return model.eval()


def output(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return open_host(model).output(model(images))


@pytest.mark.parametrize("name", TOWERS)
def test_pruned_counted_and_restored(name: str) -> None:
    model = build(name)
    before, dense = output(model), count_macs(model)
    assert cpvit.verify(model).error < 1e-5
    for method in ("cpvit", "cpvit-merge"):
        cpvit.prune_(model, cpvit.PruneConfig(method=method, macs=0.7))
        assert count_macs(model) / dense == pytest.approx(0.7, abs=0.01)
        pruned = output(model)
        torch.testing.assert_close(output(model, IMAGES[1:2]), pruned[1:2], rtol=1e-4, atol=1e-5)
    cpvit.prune_(model, cpvit.PruneConfig(macs=0.7, head_keep_rate=0.5), calibration=IMAGES)
    assert open_host(model).blocks[-1].num_heads == 2
    assert output(model).isfinite().all()
    cpvit.unprune_(model)
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("name", TOWERS)
def test_compiled_exported_saved(name: str, tmp_path: Path) -> None:
    model = build(name)
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    host = open_host(model)
    check_compile(host, IMAGES)
    check_export(host, IMAGES)
    save_pruned(model, tmp_path / "saved")
    again = load_pruned(tmp_path / "saved", model=build(name, seed=1))
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("name", ["DINOv3 stand-in", "DINOv3"])
def test_inner_blocks_of_dinov3(name: str) -> None:
    model = build(name)
    maps = model.get_intermediate_layers(IMAGES, n=2)
    cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=(12, 9, 7, 5)))
    assert [x.shape[1] for x in model.get_intermediate_layers(IMAGES, n=2)] == [7, 5]
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=1.0), dense_features=True)
    for got, expected in zip(model.get_intermediate_layers(IMAGES, n=2), maps, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_hooks_see_tokens_in_the_form_of_the_host() -> None:
    seen: list[Tensor] = []
    model = build("CLIP stand-in")
    model.transformer.resblocks[1].register_forward_hook(lambda module, args, tokens: seen.append(tokens))
    cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=(12, 9, 7, 5)))
    output(model)
    assert seen[-1].shape == (10, 3, 48)


def test_crops_of_several_sizes_are_refused() -> None:
    model = build("DINOv3 stand-in")
    cpvit.prune_(model)
    with pytest.raises(ValueError, match="crops of 2 sizes at once"):
        model([IMAGES, IMAGES[:, :, :32, :32]])


def test_stochastic_depth_of_dinov3_is_refused_while_it_trains() -> None:
    model = build("DINOv3 stand-in").train()
    cpvit.prune_(model)
    model(IMAGES)
    model.blocks[3].sample_drop_ratio = 0.05
    with pytest.raises(cpvit.PruningBypassError, match="leave out images of a batch"):
        model(IMAGES)


def test_two_towers_in_one_call_name_the_one_to_prune() -> None:
    with pytest.raises(UnsupportedModelError, match=r"needs a text too: prune_\(model\.visual, \.\.\.\)"):
        open_host(original_code.TwoTowers())


def test_a_block_of_another_class_is_refused() -> None:
    model = build("CLIP stand-in")
    model.transformer.resblocks[2] = type("LoraBlock", (original_code.ResidualAttentionBlock,), {})()
    with pytest.raises(UnsupportedModelError, match=r"CLIP's .* pruned: block 2 is a LoraBlock"):
        open_host(model)


def test_a_wrong_block_is_named_where_tokens_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("CLIP stand-in")
    block = model.transformer.resblocks[2]
    monkeypatch.setattr(block, "forward", lambda x: 1.1 * type(block).forward(block, x))
    assert cpvit.verify(model).first_block == 2
