"""``dense_features=True``: every patch in its place, as a detector or a segmenter needs it.

The oracle walks the untouched host's own blocks. Grid: 4 rows, 6 columns, patches of 8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import randomize_
from torch import Tensor, nn

from cpvit import PruneConfig, PruningBypassError, prune_, record, unprune_
from cpvit.adapters import open_host
from cpvit.core import take
from cpvit.methods.tome import ToMe
from cpvit.plans.steps import make_steps
from cpvit.pruning.cascade import Cascade
from cpvit.pruning.install import install, uninstall

ROWS, COLUMNS, PATCHES, WIDTH = 4, 6, 24, 24
KEEP = (24, 18, 9)
PRUNING = PruneConfig(keep_per_block=KEEP)
SIZES: dict[str, Any] = {
    "img_size": (32, 48),
    "patch_size": 8,
    "embed_dim": WIDTH,
    "depth": 3,
    "num_heads": 3,
}


def timm_model(name: str, **options: object) -> nn.Module:
    model = timm.create_model(name, **{**SIZES, "num_classes": 5, **options})
    randomize_(model, 0)
    return model.double().eval()


def hf_dinov2(name: str = "Dinov2Model") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=3,
        patch_size=8,
        image_size=40,
        num_labels=5,
    )
    model = getattr(transformers, name)(config)
    model.config.image_size = (32, 48)  # its positions are interpolated from the square grid
    randomize_(model, 0)
    return model.double().eval()


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm_model("vit_tiny_patch16_224"),
    "vit without pooling": lambda: timm_model(
        "vit_base_patch16_siglip_gap_224", num_classes=0, global_pool=""
    ),
    "registers": lambda: timm_model("vit_small_patch14_reg4_dinov2"),
    "eva02": lambda: timm_model("eva02_tiny_patch14_224"),
    "beit": lambda: timm_model("beit_base_patch16_224"),
    "transformers dinov2": hf_dinov2,
}


def images() -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def features(model: Any) -> Tensor:
    """[B P+N C] after the final norm."""
    if hasattr(model, "forward_features"):
        return model.forward_features(images())
    return model(images()).last_hidden_state


@torch.no_grad()
def feature_map(model: nn.Module) -> Tensor:
    """What a detector reads: [B C H W]."""
    host = open_host(model)
    grid = features(model)[:, host.num_prefix :]
    return grid.transpose(1, 2).unflatten(2, host.grid)


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> nn.Module:
    return BACKBONES[request.param]()


def test_the_shape_is_that_of_the_untouched_model(backbone: nn.Module) -> None:
    expected = features(backbone).shape
    prune_(backbone, PRUNING, dense_features=True)
    assert features(backbone).shape == expected
    prune_(backbone, PRUNING)
    assert features(backbone).shape[1] == expected[1] - PATCHES + KEEP[-1]


def test_a_feature_map_has_every_survivor_in_its_row_and_column(backbone: nn.Module) -> None:
    prune_(backbone, PRUNING)
    few = features(backbone)[:, open_host(backbone).num_prefix :]
    prune_(backbone, PRUNING, dense_features=True)
    with record(backbone) as trace:
        maps = feature_map(backbone)
    assert maps.shape == (2, WIDTH, ROWS, COLUMNS)
    for image, kept in enumerate(trace.survivors[-1].tolist()):
        for place, position in enumerate(kept):
            row, column = divmod(position, COLUMNS)
            torch.testing.assert_close(maps[image, :, row, column], few[image, place], rtol=0, atol=1e-12)


@torch.no_grad()
def values_when_leaving(model: Any, tokens: Tensor, block: int, extra: dict[str, Any]) -> Tensor:
    """A block's tokens after its attention and before its MLP, by the host's own modules."""
    host = open_host(model)
    module: Any = host.blocks[block].module
    hidden: list[Tensor] = []
    hook = module.norm2.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
    try:
        module(tokens, **extra)
    finally:
        hook.remove()
    return hidden[0]


@pytest.mark.parametrize("name", ["vit", "registers", "vit without pooling"])
def test_a_removed_patch_shows_the_value_it_had_between_attention_and_mlp(name: str) -> None:
    """KEEP lets all patches through block 0: what leaves block 1 has seen both its and block 0's attention."""
    model: Any = BACKBONES[name]()
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images())))
        tokens = model.blocks[0](tokens)
        expected = model.norm(values_when_leaving(model, tokens, 1, {}))
    prefix = open_host(model).num_prefix
    prune_(model, PRUNING, dense_features=True)
    with record(model) as trace:
        grid = features(model)
    for image, kept in enumerate(trace.survivors[1].tolist()):
        left = [prefix + patch for patch in range(PATCHES) if patch not in kept]
        assert len(left) == 6
        torch.testing.assert_close(grid[image, left], expected[image, left], rtol=0, atol=1e-12)


def test_a_merged_patch_shows_the_token_that_carries_it() -> None:
    model: Any = BACKBONES["vit"]()
    host = open_host(model)

    def run(dense: bool) -> tuple[Tensor, Tensor]:
        install(host, Cascade(host, ToMe(), make_steps(ToMe(), KEEP, PATCHES), dense_features=dense))
        try:
            with record(model) as trace:
                return features(model), trace.carriers[-1]  # type: ignore[return-value]
        finally:
            uninstall(host)

    few, carrier = run(dense=False)
    grid, again = run(dense=True)
    assert torch.equal(carrier, again)
    assert few.shape[1] == 1 + KEEP[-1]
    assert len(set(carrier[0].tolist())) == KEEP[-1]  # every token carries a patch, some several
    torch.testing.assert_close(grid, torch.cat([few[:, :1], take(few[:, 1:], carrier)], dim=1))


def test_logits_of_a_model_that_reads_its_class_token_do_not_change() -> None:
    model = BACKBONES["vit"]()
    prune_(model, PRUNING)
    expected = model(images())
    prune_(model, PRUNING, dense_features=True)
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=1e-12)


class TestHeadsThatPool:
    """Logits must not silently be a mean over patches of which some left long ago."""

    @pytest.fixture(params=["eva02", "beit", "vit_base_patch16_siglip_224", "vit_relpos_small_patch16_224"])
    def pooling(self, request: pytest.FixtureRequest) -> nn.Module:
        return BACKBONES[request.param]() if request.param in BACKBONES else timm_model(request.param)

    def test_classifying_with_dense_features_is_refused(self, pooling: Any) -> None:
        prune_(pooling, PRUNING, dense_features=True)
        assert features(pooling).shape[1] == open_host(pooling).num_tokens
        with pytest.raises(PruningBypassError, match=r"forward_head would pool the patches that have left"):
            pooling(images())

    def test_pruned_again_without_them_it_classifies(self, pooling: Any) -> None:
        prune_(pooling, PRUNING)
        expected = pooling(images())
        prune_(pooling, PRUNING, dense_features=True)
        prune_(pooling, PRUNING)
        assert torch.equal(pooling(images()), expected)
        unprune_(pooling)
        assert "forward_head" not in vars(pooling)

    def test_with_every_patch_kept_nothing_is_refused(self, pooling: Any) -> None:
        expected = pooling(images())
        prune_(pooling, PruneConfig(keep_rate=1.0), dense_features=True)
        torch.testing.assert_close(pooling(images()), expected, rtol=0, atol=1e-10)

    def test_with_a_merging_method_every_patch_has_its_carriers_value(self, pooling: Any) -> None:
        merging = PruneConfig(method="tome", keep_per_block=(20, 16, 12))
        prune_(pooling, merging)
        expected = pooling(images())
        prune_(pooling, merging, dense_features=True)
        assert torch.equal(pooling(images()), expected)

    def test_a_model_that_pools_inside_its_forward_is_refused_at_once(self) -> None:
        model: Any = hf_dinov2("Dinov2ForImageClassification")
        message = r"pools its patches before it answers; .* prune the model below its head \(Dinov2Model"
        with pytest.raises(ValueError, match=message):
            prune_(model, PRUNING, dense_features=True)
        prune_(model.dinov2, PRUNING, dense_features=True)
        assert features(model.dinov2).shape == (2, 1 + PATCHES, WIDTH)
