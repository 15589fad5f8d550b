"""Model creation by name."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from cpvit.weights.create import ORIGINAL_MODELS, create_model, resolve_model_name


def test_create_model_takes_classes_and_image_size() -> None:
    model: Any = create_model("vit_tiny_patch16_224", num_classes=7, image_size=(32, 48))
    assert not model.training
    assert model.patch_embed.grid_size == (2, 3)
    assert model(torch.zeros(2, 3, 32, 48)).shape == (2, 7)


def test_an_integer_image_size_is_square() -> None:
    model: Any = create_model("vit_tiny_patch16_224", num_classes=0, image_size=32)
    assert model.patch_embed.grid_size == (2, 2)


def test_every_original_name_is_a_timm_model() -> None:
    assert all(timm.is_model(resolve_model_name(name)) for name in ORIGINAL_MODELS)


@pytest.mark.parametrize(("name", "patch", "width"), [("ViT-B_16", 16, 768), ("ViT-B_32", 32, 768)])
def test_original_names_give_the_original_architecture(name: str, patch: int, width: int) -> None:
    with torch.device("meta"):
        model: Any = create_model(name, num_classes=10)
    assert model.patch_embed.patch_size == (patch, patch)
    assert (model.embed_dim, model.num_classes, model.norm.eps) == (width, 10, 1e-6)
    assert model.blocks[0].attn.qkv.bias is not None


def test_original_models_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        ORIGINAL_MODELS["mine"] = "vit_tiny_patch16_224"  # type: ignore[index]


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "vit_base_patch16_224.augreg_in21k", "hf-hub:timm/x", "hf_hub:timm/x"]
)
def test_timm_and_hub_names_pass_through(name: str) -> None:
    assert resolve_model_name(name) == name


def test_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown model 'deit_tiny_patch16'; did you mean deit_tiny_patch16_224"
    ):
        create_model("deit_tiny_patch16")
    with pytest.raises(ValueError, match=r"did you mean .*ViT-B_16"):
        resolve_model_name("ViT-B16")


def test_a_hopeless_name_says_where_names_are_listed() -> None:
    with pytest.raises(ValueError, match=r"unknown model '#'; give a name that timm\.list_models\(\) lists"):
        resolve_model_name("#")


def test_unknown_weights_tag_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"unknown weights 'nope' of deit_tiny_patch16_224; timm has .*fb_in1k"
    ):
        resolve_model_name("deit_tiny_patch16_224.nope")


@pytest.mark.parametrize("size", [0, -16, (32, 0), (32, 32, 3)])
def test_impossible_image_sizes(size: object) -> None:
    with pytest.raises(ValueError, match="give one positive number or"):
        create_model("vit_tiny_patch16_224", image_size=size)  # type: ignore[arg-type]


def test_image_size_must_be_whole_patches() -> None:
    with pytest.raises(
        ValueError, match="image size 40x32 is not a multiple of the 16x16 patches of vit_tiny"
    ):
        create_model("vit_tiny_patch16_224", image_size=(40, 32))


def test_model_without_fixed_image_size() -> None:
    with pytest.raises(ValueError, match="resnet18 has no fixed image size, got image_size=32; leave it out"):
        create_model("resnet18", image_size=32)


def test_negative_classes() -> None:
    with pytest.raises(ValueError, match=r"num_classes is -1; give 0 \(no head\) or more"):
        create_model("vit_tiny_patch16_224", num_classes=-1)


def test_torchvision_names_have_a_prefix() -> None:
    model: Any = create_model("torchvision/vit_b_32", num_classes=7, image_size=64)
    assert not model.training
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        (
            "torchvision/vit_b_17",
            None,
            r"unknown model 'torchvision/vit_b_17'; torchvision has vit_b_16, vit_b_32",
        ),
        ("torchvision/resnet18", None, r"unknown model 'torchvision/resnet18'"),
        ("torchvision/vit_b_16", (32, 48), r"takes square images only, got image_size=32x48"),
    ],
)
def test_torchvision_names_and_sizes_are_checked(name: str, size: tuple[int, int] | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_model(name, image_size=size)
