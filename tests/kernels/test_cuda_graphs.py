"""CUDA graphs: what is refused can be tested anywhere, what is replayed on a GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import random_images, tiny_vit

from cpvit import PruneConfig, prune_
from cpvit.kernels.cuda_graphs import CapturedModel, check_same
from cpvit.methods import METHODS


def test_without_cuda_it_says_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA device and torch sees none; call the model itself"):
        CapturedModel(tiny_vit(), random_images())


def test_a_model_that_trains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"the model is in training mode; call model.eval\(\) first"):
        CapturedModel(tiny_vit().train(), random_images())


def test_a_model_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match=r"needs the model on a CUDA device, got cpu; move it with .to\('cuda'\)"
    ):
        CapturedModel(tiny_vit(), random_images())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(3, 3, 8, 8),
            r"images of shape \(2, 3, 8, 8\) and got \(3, 3, 8, 8\); a CUDA graph is fixed",
        ),
        (torch.zeros(2, 3, 8, 8).half(), r"dtype torch.float32 and got torch.float16"),
        (torch.zeros(2, 3, 8, 8, device="meta"), r"device cpu and got meta"),
    ],
)
def test_other_images_than_those_captured_are_refused(images: torch.Tensor, message: str) -> None:
    check_same(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8))
    with pytest.raises(ValueError, match=message):
        check_same(torch.zeros(2, 3, 8, 8), images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_replay_gives_what_the_model_gives(name: str) -> None:
    model = tiny_vit().cuda()
    prune_(model, PruneConfig(method=name, keep_rate=0.4))
    captured = CapturedModel(model, random_images(2).cuda())
    for seed in (1, 2, 3):
        images = random_images(2, seed=seed).cuda()
        with torch.inference_mode():
            torch.testing.assert_close(captured(images), model(images))
    with pytest.raises(ValueError, match="captured for images of shape"):
        captured(random_images(3).cuda())
