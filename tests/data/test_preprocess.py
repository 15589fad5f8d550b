"""Preprocessing is timm's own, and refuses what makes no sense."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from pictures import SMALL, noise
from PIL import Image

from cpvit.data import (
    Preprocessing,
)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "test_vit"])
def test_preprocessing_is_timms_own(name: str) -> None:
    model = timm.create_model(name)
    config = timm.data.resolve_model_data_config(model)
    image = noise(5, (301, 207))
    expected = timm.data.create_transform(**config, is_training=False)(image)
    assert torch.equal(Preprocessing.from_model(model).transform()(image), expected)


def test_preprocessing_follows_the_size_of_the_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 80))
    preprocessing = Preprocessing.from_model(model)
    assert preprocessing.image_size == (48, 80)
    assert preprocessing.transform()(noise(1)).shape == (3, 48, 80)


def test_preprocessing_overrides() -> None:
    model = timm.create_model("test_vit", dynamic_img_size=True)
    changed = Preprocessing.from_model(
        model, image_size=64, mean=(0.5,) * 3, std=[0.5] * 3, interpolation="bilinear", crop_pct=1
    )
    assert changed == Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "center")
    white = changed.transform()(Image.new("RGB", (64, 64), "white"))
    assert torch.equal(white, torch.ones(3, 64, 64))


def test_preprocessing_survives_json() -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL


def test_preprocessing_refuses_a_size_the_model_does_not_take() -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    with pytest.raises(
        ValueError, match=r"image_size is \(64, 64\) but the model takes \(224, 224\) only; create it"
    ):
        Preprocessing.from_model(model, image_size=64)


def test_preprocessing_of_an_unknown_model() -> None:
    with pytest.raises(ValueError, match="Linear has no pretrained_cfg, so its preprocessing is unknown"):
        Preprocessing.from_model(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": [0, 5]}, r"image_size is \(0, 5\); expected height and width, both at least 1"),
        ({"image_size": [1, 2, 3]}, r"image_size is \(1, 2, 3\); expected one number"),
        ({"mean": [0.5]}, "expected three values each"),
        ({"std": [1, 1, 0]}, "std above 0"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; expected one of nearest, bilinear"),
        ({"crop_pct": 0}, "crop_pct is 0; expected a fraction above 0"),
        ({"crop_mode": "left"}, "crop_mode is 'left'; expected one of center, squash, border"),
    ],
)
def test_preprocessing_refuses_nonsense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict({**SMALL.to_dict(), **changes})
