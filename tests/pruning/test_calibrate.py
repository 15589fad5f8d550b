"""What calibration measures, on attention made by hand and against the oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import GRID, random_images, tiny_vit
from reference import paper_oracle
from torch import Tensor, nn

from cpvit import PruneConfig, calibrate, plan_of, prune_
from cpvit.adapters import open_host
from cpvit.data.loader import Batch
from cpvit.measure.evaluate import predict
from cpvit.pruning.calibrate import attention_range, patch_distances

DISTANCE = patch_distances(2, 3)


def looking_at(targets: list[int], prefix: int = 1) -> Tensor:
    """Attention [1 1 N N] in which patch i looks mostly at patch targets[i]; the prefix gets more than any."""
    tokens = prefix + len(targets)
    probs = torch.full((1, 1, tokens, tokens), 0.01)
    probs[..., :prefix] = 0.9
    for patch, target in enumerate(targets):
        probs[0, 0, prefix + patch, prefix + target] = 0.5
    return probs


def test_distances_are_euclidean_on_the_grid() -> None:
    assert DISTANCE[0].tolist() == pytest.approx([0, 1, 2, 1, 2**0.5, 5**0.5])
    torch.testing.assert_close(DISTANCE, DISTANCE.T)
    assert patch_distances(*GRID).shape == (35, 35)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_patches_that_look_at_themselves_have_range_zero(prefix: int) -> None:
    assert attention_range(looking_at(list(range(6)), prefix), prefix, DISTANCE).tolist() == [0]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([1, 0, 1, 4, 3, 4], 1.0),
        ([3, 4, 5, 0, 1, 2], 1.0),
        ([2, 1, 0, 5, 4, 3], 4 * 2 / 6),
        ([5, 1, 2, 3, 4, 0], 2 * 5**0.5 / 6),
    ],
)
def test_the_range_is_the_mean_distance_to_the_patch_most_attended(
    targets: list[int], expected: float
) -> None:
    assert attention_range(looking_at(targets), 1, DISTANCE).tolist() == pytest.approx([expected])


def test_the_range_is_a_mean_over_heads_and_one_number_per_image() -> None:
    near, far = looking_at(list(range(6))), looking_at([1, 0, 1, 4, 3, 4])
    both = torch.cat([near, far], dim=1)
    assert attention_range(torch.cat([both, both.flip(1)]), 1, DISTANCE).tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("variant", ["class", "registers", "none"])
def test_head_scores_are_the_oracles(variant: str, images: Tensor) -> None:
    model = tiny_vit(variant)
    cumulative = torch.stack(paper_oracle(model, images, [35] * 3).head_scores).mean(1)
    per_block = torch.diff(cumulative, dim=0, prepend=torch.zeros_like(cumulative[:1]))
    got = torch.tensor(calibrate(model, images).head_scores, dtype=torch.float64)
    torch.testing.assert_close(got, per_block, rtol=1e-6, atol=0)


def test_every_block_has_a_range_on_the_grid(images: Tensor) -> None:
    result = calibrate(tiny_vit(), images)
    assert result.images == 3
    assert len(result.attention_range) == 3
    assert all(0 < reach < (4**2 + 6**2) ** 0.5 for reach in result.attention_range)


@pytest.mark.parametrize("training", [False, True])
def test_calibrating_leaves_the_model_as_it_was(training: bool, images: Tensor) -> None:
    model = tiny_vit().train(training)
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    calibrate(model, images)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training == training
    assert plan_of(model) is None


def test_images_come_in_any_dtype(model: nn.Module) -> None:
    calibrate(model, random_images(dtype=torch.float32))


def test_many_images_are_measured_in_batches(model: nn.Module) -> None:
    images = random_images(33)
    assert calibrate(model, images).attention_range == pytest.approx(
        calibrate(model, images.split(7)).attention_range
    )


def test_no_images_are_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no calibration images were given; give at least one, 32 or more"):
        calibrate(model, [])
    assert plan_of(model) is None


def test_a_pruned_model_is_refused(model: nn.Module, images: Tensor) -> None:
    prune_(model)
    with pytest.raises(ValueError, match=r"is pruned already; calibrate the untouched model: call unprune_"):
        calibrate(model, images)


def test_a_failure_leaves_the_model_untouched(model: nn.Module) -> None:
    with pytest.raises(AssertionError):
        calibrate(model, [torch.zeros(1, 3, 8, 8)])
    assert type(model.blocks) is nn.Sequential


@pytest.mark.parametrize("look", ["calibrate", "predict"])
def test_a_model_that_was_looked_at_can_be_trained(look: str) -> None:
    """transformers' BEiT keeps its table of relative positions: made in inference mode, no gradient could pass it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = transformers.BeitConfig(
        **sizes, image_size=40 if look == "predict" else 48, patch_size=8, use_relative_position_bias=True
    )
    model = transformers.BeitForImageClassification(config)
    host = open_host(model)
    images = torch.randn(2, *host.image_shape)
    if look == "calibrate":
        calibrate(model, images)
    else:
        predict(host, [Batch(images, torch.tensor([0, 1]), ("a", "b"))])  # type: ignore[arg-type]
    model.train()(images).logits.sum().backward()
    prune_(model, PruneConfig(keep_rate=0.5), verify=False)
    model(images).logits.sum().backward()
