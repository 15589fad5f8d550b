"""The algebra of pruning a live model: what must not change, what must nest, and what must come back."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from typing import Any

import pytest
import torch
from conftest import GRID, PATCHES, PREFIX, random_images, tiny_vit
from torch import Tensor, nn

from cpvit import (
    Calibration,
    PruneConfig,
    PruningBypassError,
    UnsupportedModelError,
    calibrate,
    plan_of,
    prune_,
    record,
    unprune_,
    verify,
)
from cpvit.plans.macs import count_macs

PRUNING = PruneConfig(keep_per_block=(30, 20, 9))
EXACT = {"rtol": 0, "atol": 1e-10}


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def survivors(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    with record(model) as trace:
        run(model, images)
    return trace.survivors


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_keeping_everything_is_the_untouched_model(any_model: Any, images: Tensor) -> None:
    expected = run(any_model, images)
    prune_(any_model, PruneConfig(keep_rate=1.0))
    torch.testing.assert_close(run(any_model, images), expected, **EXACT)


def test_keeping_everything_is_the_untouched_model_where_every_block_is_scored(
    model: Any, images: Tensor
) -> None:
    """The last removal takes a single patch, which a class token never reads again: scores change nothing."""
    expected = run(model, images)
    prune_(model, PruneConfig(keep_per_block=(35, 35, 34)))
    torch.testing.assert_close(run(model, images), expected, **EXACT)


def test_the_default_keeps_half_of_the_patches(model: Any) -> None:
    plan = prune_(model)
    assert plan.patches_per_block[-1] == round(PATCHES / 2)
    assert plan.method == "cpvit"


def test_an_image_alone_is_pruned_as_in_a_batch(any_model: Any, images: Tensor) -> None:
    prune_(any_model, PRUNING)
    together = run(any_model, images)
    alone = torch.cat([run(any_model, image[None]) for image in images])
    torch.testing.assert_close(alone, together, **EXACT)


@pytest.mark.parametrize("chunk", [1, 20_000])
def test_splitting_a_batch_for_the_cache_changes_nothing(
    model: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_(model, PRUNING)
    images = random_images(5)
    expected = run(model, images)
    monkeypatch.setattr("cpvit.attention.CHUNK_BYTES", chunk)
    torch.testing.assert_close(run(model, images), expected, **EXACT)


def test_survivors_nest(any_model: Any, images: Tensor) -> None:
    prune_(any_model, PRUNING)
    kept = [[set(row) for row in block.tolist()] for block in survivors(any_model, images)]
    assert all(last < middle < first for first, middle, last in zip(*kept, strict=True))


def test_different_images_keep_different_patches(model: Any, images: Tensor) -> None:
    prune_(model, PRUNING)
    last = survivors(model, images)[-1]
    assert len({tuple(row) for row in last.tolist()}) == len(images)


@pytest.mark.parametrize("variant", sorted(PREFIX))
def test_prefix_tokens_survive_in_front(variant: str, images: Tensor) -> None:
    model = tiny_vit(variant)
    plan = prune_(model, PRUNING)
    with torch.inference_mode():
        features = model.forward_features(images)
    assert plan.num_prefix == PREFIX[variant]
    assert features.shape[1] == plan.tokens_per_block[-1] == PREFIX[variant] + 9


def permute_patches(images: Tensor, order: Tensor) -> Tensor:
    """The same images with their 8x8 patches in another order."""
    rows, columns = GRID
    patches = images.reshape(-1, 3, rows, 8, columns, 8).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    return patches.unflatten(1, GRID).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


@pytest.mark.parametrize("variant", ["class", "registers", "none"])
def test_permuting_the_patches_permutes_the_survivors(variant: str, images: Tensor) -> None:
    model = tiny_vit(variant)
    prune_(model, PRUNING)
    before, logits = survivors(model, images), run(model, images)
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(0))
    prefix = model.pos_embed.shape[1] - PATCHES
    model.pos_embed.data = model.pos_embed.data[:, torch.cat([torch.arange(prefix), order + prefix])]
    permuted = permute_patches(images, order)
    for old, new in zip(before, survivors(model, permuted), strict=True):
        assert torch.equal(order[new].sort(dim=1).values, old)
    torch.testing.assert_close(run(model, permuted), logits, **EXACT)


def test_unpruning_restores_bit_for_bit(any_model: Any, images: Tensor) -> None:
    state, expected = snapshot(any_model), run(any_model, images)
    kinds = [type(module) for module in any_model.modules()]
    attributes = set(vars(any_model))
    prune_(any_model, PRUNING)
    assert list(any_model.state_dict()) == list(state)
    assert not torch.equal(run(any_model, images), expected)
    unprune_(any_model)
    assert same_state(any_model, state)
    assert torch.equal(run(any_model, images), expected)
    assert [type(module) for module in any_model.modules()] == kinds
    assert set(vars(any_model)) == attributes
    assert not any(block._forward_pre_hooks for block in any_model.blocks)


def test_unpruning_puts_cut_heads_back_bit_for_bit(model: Any, images: Tensor) -> None:
    state, expected = snapshot(model), run(model, images)
    prune_(model, PruneConfig(keep_rate=0.5, head_keep_rate=0.4), calibration=images)
    assert list(model.state_dict()) == list(state)
    assert model.blocks[-1].attn.qkv.weight.shape == (3 * 2 * 6, 30)
    unprune_(model)
    assert same_state(model, state)
    assert torch.equal(run(model, images), expected)


def test_unpruning_an_untouched_model_does_nothing(model: Any) -> None:
    state = snapshot(model)
    unprune_(model)
    assert same_state(model, state)
    assert plan_of(model) is None


def test_a_live_model_can_be_pruned_at_another_ratio(model: Any, images: Tensor) -> None:
    fresh = copy.deepcopy(model)
    prune_(model, PruneConfig(keep_rate=0.2, head_keep_rate=0.4), calibration=images)
    again = prune_(model, PruneConfig(keep_rate=0.7))
    once = prune_(fresh, PruneConfig(keep_rate=0.7))
    assert again == once == plan_of(model)
    assert torch.equal(run(model, images), run(fresh, images))


def test_a_plan_is_applied_as_it_stands(model: Any, images: Tensor) -> None:
    plan = prune_(model, PruneConfig(macs=0.6, head_keep_rate=0.4), calibration=images)
    twin = tiny_vit()
    assert prune_(twin, plan) == plan
    assert torch.equal(run(twin, images), run(model, images))


def test_a_deep_copy_is_pruned_and_independent(model: Any, images: Tensor) -> None:
    prune_(model, PruneConfig(keep_rate=0.4, head_keep_rate=0.4), calibration=images)
    twin = copy.deepcopy(model)
    expected = run(model, images)
    assert torch.equal(run(twin, images), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(run(model, images), expected)
    unprune_(twin)
    assert plan_of(model) is not None
    assert torch.equal(run(model, images), expected)


def test_unpruning_a_deep_copy_restores_its_own_heads(model: Any, images: Tensor) -> None:
    expected = run(model, images)
    prune_(model, PruneConfig(head_keep_rate=0.4), calibration=images)
    twin = copy.deepcopy(model)
    unprune_(twin)
    assert torch.equal(run(twin, images), expected)
    assert twin.blocks[-1].attn.qkv.weight is not model.blocks[-1].attn.qkv.weight
    assert model.blocks[-1].attn.num_heads == 2


def test_a_pruned_model_can_be_pickled(model: Any, images: Tensor) -> None:
    prune_(model, PRUNING)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(twin, images), run(model, images))
    unprune_(twin)


def test_weights_of_a_pruned_model_load_into_an_untouched_one(model: Any, images: Tensor) -> None:
    expected = run(model, images)
    prune_(model, PRUNING)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = tiny_vit(seed=9)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(twin, images), expected)


def test_unpruned_heads_follow_the_model_to_its_dtype(model: Any, images: Tensor) -> None:
    prune_(model, PruneConfig(head_keep_rate=0.4), calibration=images)
    model.float()
    unprune_(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    run(model, images.float())


class TestDenseFeatures:
    """``forward_features`` gives every patch in its original place."""

    @staticmethod
    def features(model: Any, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model.forward_features(images)

    @pytest.mark.parametrize("variant", ["class", "registers", "none"])
    def test_survivors_are_in_their_places(self, variant: str, images: Tensor) -> None:
        model, prefix = tiny_vit(variant), PREFIX[variant]
        prune_(model, PRUNING)
        few, last = self.features(model, images), survivors(model, images)[-1]
        prune_(model, PRUNING, dense_features=True)
        grid = self.features(model, images)
        assert grid.shape == (3, prefix + PATCHES, 30)
        torch.testing.assert_close(grid[:, :prefix], few[:, :prefix], **EXACT)
        for image in range(3):
            placed = grid[image, prefix + last[image]]
            torch.testing.assert_close(placed, few[image, prefix:], **EXACT)

    def test_a_patch_that_left_shows_what_it_was_when_it_left(self, model: Any, images: Tensor) -> None:
        """It left block 0 after its attention and before its MLP."""
        with torch.inference_mode():
            tokens = model._pos_embed(model.patch_embed(images))
            block = model.blocks[0]
            attended = model.norm(tokens + block.ls1(block.attn(block.norm1(tokens))))
        prune_(model, PRUNING, dense_features=True)
        grid, first = self.features(model, images), survivors(model, images)[0]
        for image in range(3):
            left = sorted(set(range(PATCHES)) - set(first[image].tolist()))
            assert len(left) == 5
            rows = 1 + torch.tensor(left)
            torch.testing.assert_close(grid[image, rows], attended[image, rows], **EXACT)

    @pytest.mark.parametrize("variant", ["class", "distilled", "registers"])
    def test_the_classification_by_a_prefix_token_does_not_change(self, variant: str, images: Tensor) -> None:
        model = tiny_vit(variant)
        prune_(model, PRUNING)
        expected = run(model, images)
        prune_(model, PRUNING, dense_features=True)
        torch.testing.assert_close(run(model, images), expected, **EXACT)

    @pytest.mark.parametrize("variant", ["avg", "map", "none"])
    def test_a_head_that_pools_patches_is_refused_those_that_left(self, variant: str, images: Tensor) -> None:
        model = tiny_vit(variant)
        expected = run(model, images)
        prune_(model, PRUNING, dense_features=True)
        with pytest.raises(PruningBypassError, match=r"forward_head would pool the patches that have left"):
            model(images)
        unprune_(model)
        assert torch.equal(run(model, images), expected)

    def test_with_everything_kept_they_are_the_hosts(self, model: Any, images: Tensor) -> None:
        expected = self.features(model, images)
        prune_(model, PruneConfig(keep_rate=1.0), dense_features=True)
        torch.testing.assert_close(self.features(model, images), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_runs_and_stays(dtype: torch.dtype) -> None:
    model = tiny_vit("registers").to(dtype)
    prune_(model, PRUNING)
    logits = run(model, random_images(dtype=dtype))
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_autocast_runs() -> None:
    model = tiny_vit().float()
    prune_(model, PRUNING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(model, random_images(dtype=torch.float32)).isfinite().all()


def test_a_forward_is_the_same_every_time(model: Any, images: Tensor) -> None:
    prune_(model, PRUNING)
    assert torch.equal(run(model, images), run(model, images))


def test_gradients_reach_every_parameter(images: Tensor) -> None:
    model = tiny_vit("registers").train()
    prune_(model, PRUNING)
    model(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_pruned_model_compiles_in_one_graph(model: Any, images: Tensor) -> None:
    prune_(model, PRUNING)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, images), run(model, images), **EXACT)


def test_a_pruned_model_exports_for_any_batch_size(model: Any) -> None:
    prune_(model, PRUNING)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (random_images(4),), dynamic_shapes=({0: batch},), strict=False)
    for size in (1, 7):
        images = random_images(size, seed=size)
        torch.testing.assert_close(run(program.module(), images), run(model, images), **EXACT)


def test_the_trace_holds_the_last_forward_only(model: Any, images: Tensor) -> None:
    prune_(model, PRUNING)
    with record(model) as trace:
        run(model, images)
        run(model, images[:1])
    assert [tuple(kept.shape) for kept in trace.survivors] == [(1, 30), (1, 20), (1, 9)]
    assert trace.carriers == (None, None, None)


def test_recording_an_untouched_model_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 is not pruned; call prune_\(model\) first"):
        record(model).__enter__()


@pytest.mark.parametrize("give", ["tensor", "batches", "calibration"])
def test_calibration_may_be_images_batches_or_their_statistics(give: str, images: Tensor) -> None:
    statistics = calibrate(tiny_vit(), images)
    given = {"tensor": images, "batches": iter(images.split(1)), "calibration": statistics}[give]
    plan = prune_(tiny_vit(), PruneConfig(keep_rate=0.5), calibration=given)
    assert plan.schedule == "layer-aware"
    assert plan.calibration_images == 3
    assert plan == prune_(tiny_vit(), PruneConfig(keep_rate=0.5), calibration=statistics)


def test_calibration_batches_are_weighed_by_their_images(images: Tensor) -> None:
    uneven = calibrate(tiny_vit(), [images[:2], images[2:]])
    whole = calibrate(tiny_vit(), images)
    assert isinstance(whole, Calibration)
    assert uneven.attention_range == pytest.approx(whole.attention_range)


def test_heads_behind_a_norm_that_joins_them_are_refused_and_the_model_is_left_whole(images: Tensor) -> None:
    model = tiny_vit(scale_attn_norm=True)
    state = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="its attention normalises the joined heads"):
        prune_(model, PruneConfig(head_keep_rate=0.4), calibration=images)
    assert plan_of(model) is None
    assert same_state(model, state)


def test_attention_pooling_of_another_kind_is_refused() -> None:
    model: Any = tiny_vit("map")
    model.attn_pool = nn.Linear(30, 30)
    with pytest.raises(UnsupportedModelError, match=r"attention pooling by Linear is not known to cpvit"):
        prune_(model)


class TestPlanMismatch:
    """A plan made for another model is refused, and the message says what differs."""

    @pytest.fixture
    def plan(self) -> Any:
        return prune_(tiny_vit(), PRUNING)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {"patches_per_block": (30, 20)},
                r"has 2 blocks and vit_tiny_patch16_224 has 3; make a new plan",
            ),
            ({"num_patches": 36}, r"has 36 patches and vit_tiny_patch16_224 has 35"),
            ({"num_prefix": 2}, r"has 2 prefix tokens and vit_tiny_patch16_224 has 1"),
            ({"num_heads": (5, 5, 4)}, r"has \(5, 5, 4\) heads per block"),
            (
                {"model": "other_vit"},
                r"made for other_vit and the model is vit_tiny_patch16_224; make a plan",
            ),
            (
                {"patches_per_block": (30, 31, 9)},
                r"must never rise, from 35 down to at least 1, got \(30, 31, 9\)",
            ),
            ({"patches_per_block": (36, 20, 9)}, r"must never rise, from 35"),
            ({"patches_per_block": (30, 20, 0)}, r"must never rise, from 35 down to at least 1"),
            (
                {"heads": ((0, 1), (1, 0), (0,))},
                r"heads of block 1 must be distinct, rising, within 0..4, got",
            ),
            ({"heads": ((0, 1), (0, 1), ())}, r"heads of block 2 must be distinct"),
            ({"heads": ((0, 0), (0, 1), (0,))}, r"heads of block 0 must be distinct"),
            ({"heads": ((0, 5), (0, 1), (0,))}, r"heads of block 0 must be distinct"),
            ({"heads": ((-1, 0), (0, 1), (0,))}, r"heads of block 0 must be distinct"),
            ({"method": "magic"}, r"method must be one of cpvit"),
        ],
    )
    def test_a_plan_that_does_not_fit_is_refused(
        self, plan: Any, changes: dict[str, Any], words: str, images: Tensor
    ) -> None:
        model = tiny_vit()
        expected, state = run(model, images), snapshot(model)
        with pytest.raises(ValueError, match=words):
            prune_(model, dataclasses.replace(plan, **changes))
        assert plan_of(model) is None
        assert same_state(model, state)
        assert torch.equal(run(model, images), expected)

    @pytest.mark.parametrize("field", ["heads", "mask_heads"])
    def test_head_lists_must_be_as_many_as_blocks(self, plan: Any, field: str) -> None:
        value = {"heads": ((0, 1), (0,)), "mask_heads": (5, 4)}[field]
        with pytest.raises(ValueError, match=r"has 2 .* has 3; make a new plan"):
            prune_(tiny_vit(), dataclasses.replace(plan, **{field: value}))

    @pytest.mark.parametrize("counts", [(6, 5, 4), (5, 4, 0), (5, -1, 1)])
    def test_masked_head_counts_must_make_sense(self, plan: Any, counts: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"mask_heads of block . must be within 1..5, got"):
            prune_(tiny_vit(), dataclasses.replace(plan, mask_heads=counts))


def test_a_configuration_that_does_not_fit_leaves_the_live_pruning_in_force(model: Any) -> None:
    plan = prune_(model, PRUNING)
    with pytest.raises(ValueError, match="keep_per_block has 2 entries"):
        prune_(model, PruneConfig(keep_per_block=(30, 20)))
    assert plan_of(model) == plan


def test_a_block_that_is_frozen_in_eval_mode_stays_so(model: Any, images: Tensor) -> None:
    model.train()
    model.blocks[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    calibrate(model, images)
    verify(model)
    count_macs(model)
    prune_(model, PRUNING)
    unprune_(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
