"""A model that cpvit gets wrong must be found out, and the first block that differs named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_images, tiny_vit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cpvit import VerificationError, plan_of, prune_, verify
from cpvit.adapters.timm_vit import TimmBlock
from cpvit.pruning.verify import relative_error, tolerance


@pytest.fixture(params=[0, 1, 2])
def broken(request: pytest.FixtureRequest, model: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of a block of ``model`` whose view gets its MLP slightly wrong."""
    right = TimmBlock.mlp_residual
    target = model.blocks[request.param]

    def wrong(self: TimmBlock, x: Tensor) -> Tensor:
        return right(self, x) + (1e-6 * torch.arange(x.shape[-1]) if self.module is target else 0)

    monkeypatch.setattr(TimmBlock, "mlp_residual", wrong)
    return request.param


def test_a_model_that_is_known_passes(any_model: Any) -> None:
    result = verify(any_model)
    assert result.passed
    assert result.first_block is None
    assert result.error <= result.tolerance
    assert result.summary().startswith(f"{result.model}: keep-everything error ")


def test_the_first_block_that_differs_is_named(model: Any, broken: int) -> None:
    result = verify(model)
    assert not result.passed
    assert result.first_block == broken
    assert f"first in block {broken}" in result.summary()


def test_a_model_that_differs_is_not_pruned(model: Any, broken: int) -> None:
    with pytest.raises(
        VerificationError, match=rf"first in block {broken}; this model is not pruned, please report it"
    ):
        prune_(model)
    assert plan_of(model) is None
    assert type(model.blocks) is nn.Sequential


@pytest.mark.usefixtures("broken")
def test_the_check_can_be_left_out(model: Any) -> None:
    prune_(model, verify=False)
    assert plan_of(model) is not None


def test_a_difference_outside_the_blocks_is_called_that(model: Any) -> None:
    class Fickle(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    model.head = Fickle()
    assert "outside the blocks" in verify(model).summary()


def amplifying(dtype: torch.dtype = torch.float32) -> Any:
    """A model whose weights amplify rounding until the output differs by more than rounding alone explains."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=96, depth=12, num_heads=12, num_classes=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for block in model.blocks:
            block.attn.qkv.weight.mul_(3.0)
    return model.eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_that_the_model_itself_amplifies_is_no_mistake(dtype: torch.dtype) -> None:
    result = verify(amplifying(dtype))
    assert result.error > result.tolerance
    assert result.own_error is not None
    assert result.own_error < 1e-14
    assert result.passed
    assert "rounding that the model amplifies: no block differs by more than" in result.summary()


@pytest.mark.parametrize("size", [1e-6, 1e-9])
def test_a_mistake_is_found_in_a_model_that_amplifies(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    model, right = amplifying(), TimmBlock.mlp_residual
    target = model.blocks[5]

    def wrong(self: TimmBlock, x: Tensor) -> Tensor:
        return right(self, x) + (size * torch.arange(x.shape[-1]) if self.module is target else 0)

    monkeypatch.setattr(TimmBlock, "mlp_residual", wrong)
    result = verify(model)
    assert not result.passed
    assert result.first_block == 5
    with pytest.raises(VerificationError, match="first in block 5"):
        prune_(model)


def test_amplified_rounding_is_not_excused_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_float64(self: Tensor) -> Tensor:
        raise TypeError(
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
        )

    model = amplifying()
    monkeypatch.setattr(Tensor, "double", no_float64)
    monkeypatch.setattr("cpvit.pruning.verify.relative_error", lambda got, expected: 1e-5)
    monkeypatch.setattr("cpvit.pruning.verify.tolerance", lambda dtype, depth: 1e-6 if depth > 1 else 1e-4)
    result = verify(model)
    assert not result.passed
    assert result.own_error is None


def test_embeddings_that_draw_at_random_draw_alike_and_change_no_generator(model: Any) -> None:
    model.pos_drop = Shuffled()
    state = torch.random.get_rng_state()
    assert verify(model).passed
    assert torch.equal(torch.random.get_rng_state(), state)


class Shuffled(nn.Module):
    """Patches in another order in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, 1:][:, torch.randperm(x.shape[1] - 1)]], dim=1)


def test_tokens_of_the_wrong_shape_differ() -> None:
    assert relative_error(torch.zeros(1, 2), torch.zeros(1, 3)) == float("inf")


def test_values_that_are_not_finite_differ() -> None:
    assert relative_error(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 1.0])) == float("inf")


def test_the_error_is_relative_to_the_largest_value() -> None:
    assert relative_error(torch.tensor([10.0, 1.0]), torch.tensor([10.0, 2.0])) == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_is_forgiven_in_every_dtype_and_no_more(dtype: torch.dtype) -> None:
    result = verify(tiny_vit("registers").to(dtype))
    checked = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.passed
    assert result.tolerance == tolerance(checked, 3) < 1e-4, "half precision is checked in float32"
    assert result.error > 0, "the scored route rounds differently from the host's fused attention"


@pytest.mark.parametrize("training", [False, True])
def test_verifying_leaves_the_model_as_it_was(training: bool) -> None:
    model = tiny_vit().train(training)
    verify(model)
    assert model.training == training
    assert not model.blocks[0]._forward_hooks
    assert not model.blocks[0]._forward_pre_hooks
    model(random_images(1))


def test_a_pruned_model_is_refused(model: Any) -> None:
    prune_(model)
    with pytest.raises(
        ValueError, match=r"is pruned already; verify the untouched model: call unprune_\(model\)"
    ):
        verify(model)


def test_finding_the_first_difference_leaves_no_hooks(model: Any, broken: int) -> None:
    before = model(random_images(1))
    assert verify(model).first_block == broken
    for block in model.blocks:
        assert not block._forward_hooks
        assert not block._forward_pre_hooks
    assert torch.equal(model(random_images(1)), before)
