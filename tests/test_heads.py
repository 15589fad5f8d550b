"""Which heads go, and that cutting them out of the weights loses nothing that unpruning cannot bring back."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_vit
from torch import Tensor, nn

from cpvit import PruneConfig, prune_, unprune_
from cpvit.adapters import open_host
from cpvit.evaluate import count_params
from cpvit.heads import SlicedHeads, choose_heads, head_index


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
