"""Vision-language models of transformers: a pruned tower, and a text model that reads fewer image tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import cpvit
from cpvit.adapters import UnsupportedModelError
from cpvit.multimodal.prune import pruning_of
from cpvit.multimodal.tokens import fewer, group_ranks, of_highest_rank

transformers = pytest.importorskip("transformers")

from vision_language import (  # noqa: E402
    MODELS,
    TOWER,
    Seeing,
    idefics3,
    image_tokens,
    inputs,
    internvl,
    llava,
    llava_next,
    logits,
    paligemma,
    picture,
)

# PaliGemma's processor makes labels from tensors in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HALF = cpvit.PruneConfig(keep_per_block=(12, 10, 7, 6))
"""Of 16 patches; LLaVA reads what leaves the third block, the others what leaves the last."""


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def weights(seeing: Seeing) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in seeing.model.state_dict().items()}


@pytest.mark.parametrize("method", ["cpvit", "cpvit-merge"])
def test_keeping_everything_changes_nothing(name: str, method: Any) -> None:
    seeing = MODELS[name]()
    given = inputs(seeing)
    expected = logits(seeing, given)
    pruned = cpvit.prune_vlm_(
        seeing.model, cpvit.PruneConfig(method=method, keep_rate=1.0), processor=seeing.processor
    )
    assert pruned.image_tokens == pruned.dense_image_tokens
    again = inputs(seeing)
    assert torch.equal(again["input_ids"], given["input_ids"])
    torch.testing.assert_close(
        logits(seeing, again), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("method", ["cpvit", "cpvit-merge"])
def test_the_processor_writes_as_many_tokens_as_the_model_makes(name: str, method: Any) -> None:
    seeing = MODELS[name]()
    dense = inputs(seeing)
    config = cpvit.PruneConfig(method=method, keep_per_block=HALF.keep_per_block)
    pruned = cpvit.prune_vlm_(seeing.model, config, processor=seeing.processor)
    given = inputs(seeing)
    crops = image_tokens(seeing, dense)[0] / pruned.dense_image_tokens
    if name != "llava next":
        assert image_tokens(seeing, given) == [pruned.image_tokens * crops]
    assert logits(seeing, given).shape[1] == given["input_ids"].shape[1] < dense["input_ids"].shape[1]
    with pytest.raises(ValueError, match="do not match"):
        logits(seeing, dense)


def test_numbers_of_tokens_follow_the_block_that_is_read() -> None:
    reads = {"llava": 7, "llava with class token": 8, "llava of two layers": 7, "paligemma": 6}
    reads |= {"idefics3": 2, "smolvlm": 2, "internvl": 2}
    for name, expected in reads.items():
        assert cpvit.prune_vlm_(MODELS[name]().model, HALF).image_tokens == expected, name


def test_generate_runs_greedily_and_with_beams(name: str) -> None:
    seeing = MODELS[name]()
    cpvit.prune_vlm_(seeing.model, HALF, processor=seeing.processor)
    given = inputs(seeing)
    long = given["input_ids"].shape[1]
    # Forced to go on: random weights may answer with an end at once.
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    answer = seeing.model.generate(**given, **options)
    assert answer.shape == (1, long + 4)
    beams = seeing.model.generate(**given, **options, num_beams=2)
    assert beams.shape == (1, long + 4)
    step = logits(seeing, given)[:, -1].clone()
    step[:, seeing.model.generation_config.eos_token_id or []] = -torch.inf
    assert answer[0, long] == step.argmax()


def test_restoring_is_exact_for_model_and_processor(name: str) -> None:
    seeing = MODELS[name]()
    given, before = inputs(seeing), weights(seeing)
    expected, settings = logits(seeing, given), seeing.model.config.to_dict()
    processor = seeing.processor.to_dict()
    cpvit.prune_vlm_(seeing.model, HALF, processor=seeing.processor)
    logits(seeing, inputs(seeing))
    cpvit.unprune_vlm_(seeing.model)
    assert pruning_of(seeing.model) is None
    assert torch.equal(inputs(seeing)["input_ids"], given["input_ids"])
    assert torch.equal(logits(seeing, given), expected)
    assert all(torch.equal(value, before[key]) for key, value in seeing.model.state_dict().items())
    assert seeing.model.config.to_dict() == settings
    assert seeing.processor.to_dict() == processor
    assert not any(map(vars(seeing.processor).get, ("_get_unpadded_features",)))


def test_an_image_alone_is_the_same_as_in_a_batch(name: str) -> None:
    seeing = MODELS[name]()
    cpvit.prune_vlm_(seeing.model, HALF, processor=seeing.processor)
    pictures = [picture(seed=seed) for seed in range(3)]
    batch = logits(seeing, inputs(seeing, *pictures))
    alone = logits(seeing, inputs(seeing, pictures[1]))
    torch.testing.assert_close(batch[1:2], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_pruning_again_starts_from_the_untouched_model() -> None:
    seeing = llava()
    cpvit.prune_vlm_(seeing.model, HALF, processor=seeing.processor)
    pruned = cpvit.prune_vlm_(
        seeing.model, cpvit.PruneConfig(keep_per_block=(15, 14, 13, 12)), processor=seeing.processor
    )
    assert (pruned.image_tokens, pruned.dense_image_tokens) == (13, 16)
    assert image_tokens(seeing, inputs(seeing)) == [13]
    assert seeing.model.config.image_seq_length == 13
    cpvit.unprune_vlm_(seeing.model)
    assert seeing.model.config.image_seq_length == 16
    assert seeing.processor.num_additional_image_tokens == 1


def features(seeing: Seeing, given: Any) -> list[Tensor]:
    """What the text model gets of each image."""
    names = ("pixel_values", "image_sizes", "pixel_attention_mask")
    with torch.no_grad():
        found = seeing.model.get_image_features(**{key: given[key] for key in names if key in given})
    return list(found.pooler_output)


@pytest.mark.parametrize("method", ["cpvit", "cpvit-merge"])
@pytest.mark.parametrize(("build", "block"), [(llava, 2), (paligemma, 3)])
def test_the_text_model_gets_the_survivors_in_the_order_of_the_grid(
    build: Any, block: int, method: Any
) -> None:
    """A connector that treats each token alone gets exactly what left the block, sorted by position."""
    seeing = build()
    config = cpvit.PruneConfig(method=method, keep_per_block=HALF.keep_per_block)
    cpvit.prune_vlm_(seeing.model, config)
    entered: list[Tensor] = []
    seeing.model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: entered.append(args[0])
    )
    leaving: list[Tensor] = []
    given = inputs(seeing, picture(seed=1))
    with cpvit.record(seeing.tower) as trace:
        tower = copy.deepcopy(seeing.tower)
        features(seeing, given)
    positions = trace.survivors[block][0].sort().values
    # The tower alone, pruned by the same plan, without the full grid.
    cpvit.unprune_(tower)
    plan = cpvit.prune_(tower, cpvit.plan_of(seeing.tower))
    assert plan == cpvit.plan_of(seeing.tower)
    with torch.no_grad():
        alone = tower(given["pixel_values"], output_hidden_states=True)
    leaving = [alone.hidden_states[-2] if build is llava else alone.last_hidden_state]
    prefix = leaving[0].shape[1] - len(positions)
    order = trace.survivors[block][0].argsort()
    assert positions.tolist() == sorted(set(positions.tolist()))
    torch.testing.assert_close(entered[0], leaving[0][:, prefix:][:, order])


@pytest.mark.parametrize("build", [idefics3, internvl])
def test_a_token_behind_a_shuffle_stands_for_four_patches(build: Any) -> None:
    """Changing one patch in front of the connector changes one token behind it: that of its square."""
    seeing = build()
    model = seeing.model.model
    given = inputs(seeing)
    dense = features(seeing, given)[0][:4]
    for patch in range(16):
        norm = seeing.tower.register_forward_hook(lambda _, args, out, patch=patch: bumped(out, patch))
        changed = (features(seeing, given)[0][:4] - dense).abs().amax(dim=1) > 0
        norm.remove()
        one = torch.zeros(1, 16)
        one[0, patch] = 1
        assert torch.equal(changed, group_ranks(one, (4, 4), 2)[0] > 0), patch
    assert type(model).__name__ in ("Idefics3Model", "InternVLModel")


def bumped(out: Any, patch: int) -> Any:
    """What a tower returns, with one patch of the first image changed."""
    tokens = out.last_hidden_state.clone()
    tokens[0, tokens.shape[1] - 16 + patch] += 1
    out.last_hidden_state = tokens
    return out


@pytest.mark.parametrize("build", [idefics3, internvl])
def test_the_squares_with_most_patches_left_are_kept(build: Any) -> None:
    seeing = build()
    given = inputs(seeing)
    cpvit.prune_vlm_(seeing.model, HALF)
    behind: list[Tensor] = []
    connector = (
        seeing.model.model.connector if build is idefics3 else seeing.model.model.multi_modal_projector
    )
    connector.register_forward_hook(lambda _, args, out: behind.append(out))
    with cpvit.record(seeing.tower) as trace:
        features(seeing, given)
    full: list[Tensor] = []
    with torch.no_grad():  # the connector itself, without hooks, on the same input
        connector.register_forward_pre_hook(
            lambda _, args: full.append(type(connector).forward(connector, *args))
        )
        features(seeing, given)
    for crop in range(len(behind[0])):
        outlasted = [0] * 4
        for left in trace.survivors:
            for patch in left[crop].tolist():
                outlasted[patch // 8 * 2 + patch % 4 // 2] += 1
        kept = [row for row in range(4) if (full[0][crop, row] == behind[0][crop]).all(dim=1).any()]
        assert kept == sorted(kept)
        assert len(kept) == 2
        assert min(outlasted[row] for row in kept) >= max(
            outlasted[row] for row in range(4) if row not in kept
        )
        torch.testing.assert_close(behind[0][crop], full[0][crop, kept])


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (50, 50), (20, 90)])
def test_llava_next_counts_alike_in_processor_and_model(height: int, width: int) -> None:
    """Images of other shapes have other crops, rows and numbers of tokens."""
    seeing = llava_next()
    shown = picture(height, width)
    dense = image_tokens(seeing, inputs(seeing, shown))[0]
    whole = features(seeing, inputs(seeing, shown))[0]
    assert len(whole) == dense
    newline = seeing.model.model.image_newline
    rows = int((whole == newline).all(dim=1).sum())
    cpvit.prune_vlm_(seeing.model, HALF, processor=seeing.processor)
    given = inputs(seeing, shown)
    fewer_tokens = features(seeing, given)[0]
    assert len(fewer_tokens) == image_tokens(seeing, given)[0] == rows + fewer(dense - rows, 7, 16)
    assert int((fewer_tokens == newline).all(dim=1).sum()) == rows
    assert logits(seeing, given).shape[1] == given["input_ids"].shape[1]


def test_equal_ranks_are_kept_all_over_the_image() -> None:
    kept = of_highest_rank(torch.zeros(1, 64), 16)[0]
    assert kept.tolist() == sorted(kept.tolist())
    assert [int(((kept >= start) & (kept < start + 16)).sum()) for start in range(0, 64, 16)] == [3, 4, 4, 5]


def test_a_copy_is_pruned_apart() -> None:
    seeing = llava()
    cpvit.prune_vlm_(seeing.model, HALF, processor=seeing.processor)
    given = inputs(seeing)
    expected = logits(seeing, given)
    other = seeing._replace(model=copy.deepcopy(seeing.model))
    cpvit.unprune_vlm_(other.model)
    assert torch.equal(logits(seeing, given), expected)
    assert seeing.processor.num_additional_image_tokens == 1 - 9


def test_a_tower_pruned_apart_is_noticed() -> None:
    seeing = llava()
    cpvit.prune_vlm_(seeing.model, HALF, processor=seeing.processor)
    cpvit.prune_(seeing.tower, cpvit.PruneConfig(keep_rate=0.5))
    with pytest.raises(cpvit.PruningBypassError, match=r"pruned apart.*prune_vlm_\(model"):
        logits(seeing, inputs(seeing))


def test_a_failure_leaves_model_and_processor_untouched() -> None:
    seeing = idefics3()
    seeing.processor.image_seq_len = 169
    given = inputs(seeing)
    with pytest.raises(
        ValueError, match=r"writes 169 image tokens, and the untouched model makes 4 .*as it was loaded"
    ):
        cpvit.prune_vlm_(seeing.model, HALF, processor=seeing.processor)
    assert seeing.processor.image_seq_len == 169
    assert cpvit.plan_of(seeing.tower) is None
    assert torch.equal(inputs(seeing)["input_ids"], given["input_ids"])


def test_the_processor_of_another_model_is_noticed() -> None:
    with pytest.raises(ValueError, match=r"LlavaProcessor has no image_seq_len.*Idefics3Model"):
        cpvit.prune_vlm_(idefics3().model, HALF, processor=llava().processor)
    other = llava("full")
    with pytest.raises(ValueError, match="writes 17 image tokens, and the untouched model makes 16"):
        cpvit.prune_vlm_(llava().model, HALF, processor=other.processor)


def test_a_model_that_leaves_out_a_patch_for_a_class_token_is_refused() -> None:
    tower = transformers.SiglipVisionConfig(**TOWER, vision_use_head=False)
    with pytest.raises(UnsupportedModelError, match=r"leaves out the first token of its tower .*set 'full'"):
        cpvit.prune_vlm_(llava(tower=tower).model)


def test_a_tower_with_a_pooling_head_is_refused_for_removal() -> None:
    seeing = paligemma(vision_use_head=True)
    with pytest.raises(ValueError, match="vision_use_head=False"):
        cpvit.prune_vlm_(seeing.model, HALF)
    assert cpvit.plan_of(seeing.tower) is None


def test_embeddings_in_place_of_features_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="what enters the first of 4 blocks"):
        cpvit.prune_vlm_(llava(layer=0).model)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Qwen2_5_VLForConditionalGeneration", r"visual\.merger joins 2 x 2 neighbours.*Supported: LLaVA"),
        ("Qwen2VLForConditionalGeneration", r"visual\.merger"),
        ("Gemma3ForConditionalGeneration", r"multi_modal_projector \(average pooling\)"),
        ("Blip2ForConditionalGeneration", r"qformer.*prune_\(model\.vision_model"),
        ("LlavaOnevisionForConditionalGeneration", "pack_image_features"),
        ("Mistral3ForConditionalGeneration", "Pixtral"),
        ("ViTForImageClassification", r"how it joins image and text is not known.*prune_\(model, \.\.\.\)"),
    ],
)
def test_others_are_refused_with_the_reason(kind: str, reason: str) -> None:
    found = getattr(transformers, kind)
    with torch.device("meta"):
        model = found(found.config_class())
    with pytest.raises(UnsupportedModelError, match=reason):
        cpvit.prune_vlm_(model)
