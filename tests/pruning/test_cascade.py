"""The loop put in the host's place: what it must refuse, and that forwards do not meet."""

from __future__ import annotations

import copy
import gc
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from conftest import needs, random_images, tiny_vit
from torch import Tensor, nn

from cpvit import PruneConfig, PruningBypassError, prune_, record, unprune_
from cpvit.adapters import open_host
from cpvit.core import CPViT
from cpvit.plans.steps import make_steps
from cpvit.pruning.install import installed

PRUNING = PruneConfig(keep_per_block=(30, 20, 9))


@pytest.fixture
def pruned() -> Any:
    model = tiny_vit()
    prune_(model, PRUNING)
    return model


def test_maps_of_inner_blocks_need_the_full_grid(pruned: Any, images: Tensor) -> None:
    message = (
        "{} would lay the patches out as a map, and some have left; prune the model with dense_features=True"
    )
    with pytest.raises(PruningBypassError, match=message.format("forward_intermediates")):
        pruned.forward_intermediates(images)
    with pytest.raises(PruningBypassError, match=message.format("get_intermediate_layers")):
        pruned.get_intermediate_layers(images, reshape=True)


@pytest.mark.parametrize("stop_early", [False, True])
def test_inner_blocks_give_the_tokens_that_leave_them(pruned: Any, images: Tensor, stop_early: bool) -> None:
    inner = pruned.forward_intermediates(
        images, [0, 1], output_fmt="NLC", intermediates_only=True, stop_early=stop_early
    )
    assert [tokens.shape[1] for tokens in inner] == [30, 20]
    (last,) = pruned.get_intermediate_layers(images, [2], norm=True)
    assert torch.equal(last, pruned.forward_features(images)[:, 1:])


@pytest.mark.parametrize("method", ["cpvit", "tome"])
def test_inner_blocks_give_maps_of_dense_features(images: Tensor, method: str) -> None:
    model = tiny_vit()
    config = PruneConfig(keep_per_block=(30, 20, 12), method=method)
    prune_(model, config, dense_features=True)
    with record(model) as trace:
        final, maps = model.forward_intermediates(images, norm=True)
    assert [tuple(grid.shape) for grid in maps] == [(len(images), 30, 5, 7)] * 3
    assert torch.equal(final, model.forward_features(images))
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), final[:, 1:])
    prune_(model, config)
    tokens = model.forward_intermediates(images, norm=True, output_fmt="NLC", intermediates_only=True)
    for grid, survivors, positions in zip(maps, tokens, trace.survivors, strict=True):
        here = positions[:, :, None].expand_as(survivors)
        torch.testing.assert_close(grid.flatten(2).transpose(1, 2).gather(1, here), survivors)


def test_keeping_everything_inner_blocks_give_the_hosts_maps(images: Tensor) -> None:
    model = tiny_vit()
    expected = model.forward_intermediates(images, intermediates_only=True)
    prune_(model, PruneConfig(keep_rate=1.0), dense_features=True)
    for got, there in zip(
        model.forward_intermediates(images, intermediates_only=True), expected, strict=True
    ):
        torch.testing.assert_close(got, there)


@pytest.mark.parametrize("name", ["forward_intermediates", "get_intermediate_layers"])
def test_methods_that_walk_the_blocks_are_back_after_unpruning(
    pruned: Any, images: Tensor, name: str
) -> None:
    unprune_(pruned)
    assert name not in vars(pruned)
    getattr(pruned, name)(images)


def test_timms_feature_extraction_is_refused() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=3, features_only=True
    )
    with pytest.raises(TypeError, match="cannot be pruned"):
        prune_(model)


def test_a_block_called_directly_is_refused(pruned: Any) -> None:
    tokens = torch.zeros(1, 36, 30, dtype=torch.float64)
    with pytest.raises(PruningBypassError, match=re.escape("block 1 (Block) of a pruned model was called")):
        pruned.blocks[1](tokens)
    with pytest.raises(PruningBypassError, match="called directly"):
        pruned.blocks.get_submodule("2")(tokens)


@pytest.mark.parametrize(
    ("part", "words"), [(slice(0, 2), "blocks 0 to 2"), (slice(1, None), "blocks 1 to None")]
)
def test_a_slice_of_the_blocks_is_refused(pruned: Any, part: slice, words: str) -> None:
    with pytest.raises(PruningBypassError, match=f"{words} of a pruned model cannot be taken out"):
        pruned.blocks[part]


def test_the_blocks_can_still_be_counted_and_looked_at(pruned: Any) -> None:
    assert len(pruned.blocks) == 3
    assert [type(block) for block in pruned.blocks.children()] == [type(pruned.blocks[0])] * 3
    assert pruned.blocks[-1].attn.num_heads == 5


def test_the_hosts_own_gradient_checkpointing_is_refused(pruned: Any, images: Tensor) -> None:
    pruned.set_grad_checkpointing(True)
    with pytest.raises(PruningBypassError, match=r"use prune_\(..., checkpointing=True\)"):
        pruned(images)
    with pytest.raises(PruningBypassError, match=r"use prune_\(..., checkpointing=True\)"):
        iter(pruned.blocks)
    pruned.set_grad_checkpointing(False)
    pruned(images)


def test_a_step_run_twice_is_refused(pruned: Any) -> None:
    steps = list(pruned.blocks)
    tokens = torch.randn(1, 36, 30, dtype=torch.float64)
    steps[0](tokens)
    with pytest.raises(
        PruningBypassError, match=r"block 0 .* was run out of order \(expected block 1\).*repeated, skipped"
    ):
        steps[0](tokens)


def test_a_step_that_skips_a_block_is_refused(pruned: Any) -> None:
    with pytest.raises(PruningBypassError, match=r"block 1 .* out of order \(expected block 0\)"):
        list(pruned.blocks)[1](torch.zeros(1, 36, 30, dtype=torch.float64))


@pytest.mark.parametrize("mask", [{"attn_mask": torch.ones(36, 36, dtype=torch.bool)}, {"is_causal": True}])
def test_masks_over_patches_that_may_have_left_are_refused(
    pruned: Any, images: Tensor, mask: dict[str, Any]
) -> None:
    if "is_causal" in mask:
        needs("timm", "1.0.26")  # the first whose forward_features takes it
    with pytest.raises(ValueError, match=f"a pruned model cannot take {next(iter(mask))}"):
        pruned.forward_features(images, **mask)


def test_another_image_size_is_named_with_what_was_expected(images: Tensor) -> None:
    model = tiny_vit(dynamic_img_size=True)
    prune_(model, PRUNING)
    with pytest.raises(ValueError, match=r"pruned for 35 patches \(5x7\) and got 20; give images of 40x56"):
        model(images[:, :, :32, :40])


def test_a_model_that_drops_random_patches_while_it_trains_is_refused_meanwhile(images: Tensor) -> None:
    model = tiny_vit(patch_drop_rate=0.3)
    prune_(model, PRUNING)
    model(images)
    model.train()
    with pytest.raises(PruningBypassError, match=r"drops random patches while it trains \(patch_drop_rate\)"):
        model(images)


@pytest.mark.parametrize("dense_features", [False, True])
def test_recomputing_blocks_gives_the_same_gradients(images: Tensor, dense_features: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_vit("registers").train()
        prune_(model, PRUNING, checkpointing=checkpointing, dense_features=dense_features)
        inputs = images.clone().requires_grad_()
        model(inputs).square().sum().backward()
        gradients.append([inputs.grad, *(parameter.grad for parameter in model.parameters())])
    assert len(gradients[0]) > 30
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=1e-12)


def test_recomputing_blocks_holds_less_for_the_backward_pass(images: Tensor) -> None:
    held = []
    for checkpointing in (False, True):
        model = tiny_vit()
        prune_(model, PRUNING, checkpointing=checkpointing)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t.numel()) or t, lambda t: t
        ):
            model(images)
        held.append(sum(saved))
    assert held[1] < held[0] / 2


def test_threads_do_not_disturb_one_another(pruned: Any) -> None:
    batches = [random_images(2, seed=seed) for seed in range(12)]
    with torch.inference_mode():
        expected = [pruned(batch) for batch in batches]

    def run(batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return pruned(batch)

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(run, batches))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_forwards_may_be_interleaved_block_by_block(pruned: Any) -> None:
    first, second = (pruned.blocks.cascade.start() for _ in range(2))
    a, b = (torch.randn(1, 36, 30, dtype=torch.float64) for _ in range(2))
    with torch.inference_mode():
        expected = pruned.blocks(a), pruned.blocks(b)
        for one, other in zip(first, second, strict=True):
            a, b = one(a), other(b)
    assert torch.equal(a, expected[0])
    assert torch.equal(b, expected[1])


def test_a_forward_that_failed_leaves_nothing_behind(pruned: Any, images: Tensor) -> None:
    with torch.inference_mode():
        expected = pruned(images)
        with pytest.raises(RuntimeError):
            pruned(images.bfloat16())
        assert torch.equal(pruned(images), expected)


def test_no_state_of_a_forward_is_left_on_the_model(pruned: Any, images: Tensor) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    before = tensors()
    with torch.inference_mode():
        pruned(images)
    assert tensors() <= before


def test_installing_changes_neither_names_nor_weights(model: nn.Module) -> None:
    names = [name for name, _ in model.named_modules()]
    before = copy.deepcopy(model.state_dict())
    prune_(model, PRUNING)
    assert [name for name, _ in model.named_modules()] == names
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_train_and_eval_reach_the_blocks_of_a_pruned_model(pruned: Any) -> None:
    pruned.train()
    assert all(module.training for module in pruned.modules())
    pruned.eval()
    unprune_(pruned)
    assert not any(module.training for module in pruned.modules())


@pytest.mark.parametrize(
    ("keep", "scored"),
    [((30, 20, 9), [True] * 3), ((35, 20, 20), [True, True, False]), ((35, 35, 35), [False] * 3)],
)
def test_blocks_are_scored_up_to_the_last_removal_and_no_further(
    keep: tuple[int, ...], scored: list[bool]
) -> None:
    assert [step.score for step in make_steps(CPViT(), keep, 35)] == scored


def test_a_masked_head_needs_every_block_scored() -> None:
    assert all(step.score for step in make_steps(CPViT(), (35, 20, 20), 35, (5, 4, 3)))


def test_positions_matter_from_the_first_block_after_a_removal() -> None:
    assert [step.pruned for step in make_steps(CPViT(), (35, 20, 20), 35)] == [False, False, True]


def test_a_watcher_is_gone_after_its_with_even_if_it_failed(pruned: Any) -> None:
    container = installed(open_host(pruned))
    with pytest.raises(KeyError), record(pruned):
        raise KeyError
    assert container.cascade.hooks == []


@pytest.mark.parametrize("training", [False, True])
def test_pruning_and_unpruning_keep_the_mode_of_every_module(training: bool) -> None:
    model = tiny_vit().train(training)
    prune_(model, PRUNING)
    assert all(module.training == training for module in model.modules())
    unprune_(model)
    assert all(module.training == training for module in model.modules())


def test_undoing_leaves_no_attribute_and_no_hook(model: nn.Module) -> None:
    attributes = set(vars(model))
    prune_(model, PRUNING)
    unprune_(model)
    assert set(vars(model)) == attributes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
