"""Which heads go, and that cutting them out of the weights loses nothing that unpruning cannot bring back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import needs, random_images, tiny_vit
from torch import Tensor, nn

from cpvit import PruneConfig, prune_, unprune_
from cpvit.adapters import open_host
from cpvit.measure.evaluate import count_params
from cpvit.plans.heads import HeadOutputs, choose_heads, least_missed
from cpvit.pruning.heads import RIDGE, SlicedHeads, corrected_projection, head_index


def test_heads_go_by_their_accumulated_score() -> None:
    scores = [[5.0, 1.0, 3.0], [0.0, 4.5, 3.0]]
    assert choose_heads(scores, [3, 2]) == ((0, 1, 2), (1, 2))


def test_a_head_that_went_stays_out_however_high_it_scores_later() -> None:
    scores = [[5.0, 1.0, 3.0], [0.0, 100.0, 0.0]]
    assert choose_heads(scores, [2, 2]) == ((0, 2), (0, 2))


def test_the_first_of_equal_heads_stays() -> None:
    assert choose_heads([[1.0, 1.0, 1.0]], [2]) == ((0, 1),)


def test_rows_of_a_head_are_found_in_every_group() -> None:
    assert head_index([0, 2], heads=3, groups=1, width=2).tolist() == [0, 1, 4, 5]
    assert head_index([1], heads=2, groups=3, width=2).tolist() == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize("variant", ["class", "qk_norm", "unbiased"])
def test_a_block_with_heads_cut_gives_what_the_others_gave(variant: str) -> None:
    needs(
        "timm", "1.0.26"
    )  # before, its attention could not run with fewer heads; a cascade does not call it
    model = tiny_vit(variant)
    attn = model.blocks[0].attn
    x = torch.randn(2, 9, 30, dtype=torch.float64)
    keep = [1, 3, 4]
    with torch.no_grad():
        removed = [column for column in range(30) if column // 6 not in keep]
        whole = attn.proj.weight.clone()
        attn.proj.weight[:, removed] = 0
        expected = attn(x)
        attn.proj.weight.copy_(whole)
        cut = SlicedHeads(open_host(model).blocks[0], keep)
        torch.testing.assert_close(attn(x), expected, rtol=0, atol=1e-12)
        assert (attn.qkv.out_features, attn.proj.in_features, attn.num_heads) == (54, 18, 3)
        cut.restore()
    assert attn.num_heads == 5
    assert attn.proj.weight.shape == (30, 30)


def test_the_very_parameters_come_back(model: nn.Module, images: Tensor) -> None:
    before = dict(model.named_parameters())
    prune_(model, PruneConfig(head_keep_rate=0.4), calibration=images)
    unprune_(model)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("trainable", [False, True])
def test_cut_parameters_are_trainable_if_they_were(trainable: bool, images: Tensor) -> None:
    model = tiny_vit().requires_grad_(trainable)
    prune_(model, PruneConfig(head_keep_rate=0.4), calibration=images)
    assert {parameter.requires_grad for parameter in model.parameters()} == {trainable}


def test_a_cut_model_holds_fewer_parameters(model: nn.Module, images: Tensor) -> None:
    dense = count_params(model)
    plan = prune_(model, PruneConfig(head_keep_rate=0.4), calibration=images)
    gone = sum(5 - heads for heads in plan.heads_per_block)
    assert plan.heads_per_block == (4, 3, 2)
    assert dense - count_params(model) == gone * (3 * 6 * 31 + 6 * 30)


def test_a_cut_model_trains(model: nn.Module, images: Tensor) -> None:
    prune_(model, PruneConfig(head_keep_rate=0.4), calibration=images)
    model(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def head_statistics(width: int = 30) -> HeadOutputs:
    """Correlated outputs of five heads, with a mean."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return HeadOutputs(torch.linspace(-1, 1, width, dtype=torch.float64), mixing @ mixing.T / width)


def error_of(weight: Tensor, kept: Tensor, better: Tensor, shift: Tensor, outputs: HeadOutputs) -> float:
    """E |W o - W' o_K - b'|^2, written out."""
    whole = weight.clone()
    whole[:, kept] -= better
    rest = whole @ outputs.mean - shift
    return float((whole @ outputs.covariance @ whole.T).trace() + rest @ rest)


def test_no_projection_near_the_corrected_one_errs_less() -> None:
    outputs, kept = head_statistics(), head_index([0, 2, 3], heads=5, groups=1, width=6)
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    better, shift = corrected_projection(weight, outputs, kept, centred=True)
    least = error_of(weight, kept, better, shift, outputs)
    plain = error_of(weight, kept, weight[:, kept], torch.zeros(7, dtype=torch.float64), outputs)
    assert least < 0.8 * plain
    for seed in range(5):
        nudge = 0.05 * torch.randn(better.shape, generator=torch.Generator().manual_seed(seed)).double()
        assert least < error_of(weight, kept, better + nudge, shift, outputs)
        assert least < error_of(weight, kept, better, shift + nudge[:, 0], outputs)


def test_heads_that_say_the_same_as_others_are_made_up_for_completely() -> None:
    model = tiny_vit()
    attn = model.blocks[1].attn
    with torch.no_grad():  # heads 3 and 4 repeat heads 0 and 1
        for part in attn.qkv.weight.view(3, 5, 6, 30):
            part[3:] = part[:2]
        for part in attn.qkv.bias.view(3, 5, 6):
            part[3:] = part[:2]
    images = random_images(8, seed=1)
    expected = model(images)
    keep = (1.0,) * model_depth(model)
    heads = tuple((0, 1, 2) if block == 1 else tuple(range(5)) for block in range(model_depth(model)))
    plan = replace(prune_(model, PruneConfig(keep_per_block=keep)), heads=heads)
    unprune_(model)
    prune_(model, plan)
    plain = (model(images) - expected).abs().max()
    prune_(model, replace(plan, head_correction=True), calibration=images)
    corrected = (model(images) - expected).abs().max()
    assert corrected < 0.02 * plain
    unprune_(model)
    assert torch.equal(model(images), expected)


def test_a_projection_without_bias_is_corrected_through_the_origin() -> None:
    outputs, kept = head_statistics(), head_index([1, 2], heads=5, groups=1, width=6)
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    better, shift = corrected_projection(weight, outputs, kept, centred=False)
    assert not shift.any()
    nudge = 0.05 * torch.randn(better.shape, generator=torch.Generator().manual_seed(4)).double()
    least = error_of(weight, kept, better, shift, outputs)
    assert least < error_of(weight, kept, better + nudge, shift, outputs)


def test_a_corrected_plan_asks_for_calibration_images(model: nn.Module, images: Tensor) -> None:
    plan = prune_(model, PruneConfig(head_keep_rate=0.4, head_correction=True), calibration=images)
    assert plan.head_correction
    with pytest.raises(
        ValueError, match=r"corrects the projections.*calibration images.*head_correction=False"
    ):
        prune_(model, plan)
    uncorrected = prune_(model, replace(plan, head_correction=False))
    assert not uncorrected.head_correction


def test_a_plan_that_does_not_fit_leaves_the_corrected_heads_in_force(
    model: nn.Module, images: Tensor
) -> None:
    plan = prune_(model, PruneConfig(head_keep_rate=0.4, head_correction=True), calibration=images)
    before, parameters = model(images), dict(model.named_parameters())
    with pytest.raises(ValueError, match="made for another"):
        prune_(model, replace(plan, model="another"))
    assert torch.equal(model(images), before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    unprune_(model)


def model_depth(model: nn.Module) -> int:
    return len(open_host(model).blocks)


def test_the_heads_that_are_missed_least_go_and_every_block_keeps_one() -> None:
    damage = {(0, 0): 0.1, (0, 1): 0.2, (0, 2): 0.3, (1, 0): 9.0, (1, 1): 8.0, (1, 2): 7.0}
    assert least_missed(damage, 1.0) == ((0, 1, 2), (0, 1, 2))
    assert least_missed(damage, 2 / 3) == ((2,), (0, 1, 2))
    assert least_missed(damage, 0.5) == ((2,), (0, 1))
    assert least_missed(damage, 0.01) == ((2,), (0,))


def test_without_a_bias_the_correction_is_the_best_through_the_origin() -> None:
    """Heads whose outputs have a mean: the second moment counts, not the covariance alone."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(500, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    ) + torch.arange(6, dtype=torch.float64)
    outputs = HeadOutputs(given.mean(0), torch.cov(given.T, correction=0))
    weight, kept = torch.randn(4, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 2, 3, 5])
    moment = (given.T @ given / len(given))[kept][:, kept]
    ridge = RIDGE * moment.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    gone = given[:, [1, 4]]
    predicted = torch.linalg.solve(moment + ridge, given[:, kept].T @ gone / len(given)).T
    got, shift = corrected_projection(weight, outputs, kept, centred=False)
    torch.testing.assert_close(got, weight[:, kept] + weight[:, [1, 4]] @ predicted)
    assert not shift.any()
