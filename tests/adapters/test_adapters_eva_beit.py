"""timm's EVA, BEiT and relative-position families: positions must follow the patches that survive.

The oracle knows nothing of the cascade: it runs the untouched host on every token and, in place of torch's
fused attention, hides the patches that left by masking their keys. What it keeps must be what the cascade
computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from conftest import needs
from timm.models import beit, eva, vision_transformer, vision_transformer_relpos
from timm.models.cait import Cait
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cpvit import (
    PruneConfig,
    PruningBypassError,
    UnsupportedModelError,
    prune_,
    record,
    unprune_,
    verify,
)
from cpvit.adapters import open_host
from cpvit.adapters.refusals import GENERAL
from cpvit.plans.macs import count_macs

Build = Callable[[], nn.Module]

SIZES = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
KEEP = (19, 19, 8)
"""Of 24 patches: some leave block 0, none block 1, most block 2 (which shows only in the MLP)."""

ROPE = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
EVA: dict[str, dict[str, Any]] = {
    "eva": {"init_values": 0.1, "global_pool": "avg"},
    "eva_token": {"global_pool": "token"},
    "eva02": {**ROPE, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "ref_feat_shape": (4, 4)},
    "eva02_packed": {"use_rot_pos_emb": True, "swiglu_mlp": True, "init_values": 0.1},
    "inner_norm": {**ROPE, "scale_attn_inner": True, "swiglu_mlp": True},
    "post_norm": {**ROPE, "use_post_norm": True},
    "no_bias": {**ROPE, "qkv_bias": False},
    "registers": {**ROPE, "num_reg_tokens": 4, "no_embed_class": True},
    "only_registers": {**ROPE, "class_token": False, "num_reg_tokens": 2, "no_embed_class": True},
    "no_prefix": {**ROPE, "class_token": False},
    "dinov3": {
        **ROPE,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "rope_temperature": 100.0,
        "num_reg_tokens": 4,
        "qkv_bias": False,
        "init_values": 0.1,
        "no_embed_class": True,
    },
    "perception_encoder": {
        "use_rot_pos_emb": True,
        "attn_type": "rope",
        "rope_grid_indexing": "xy",
        "use_pre_transformer_norm": True,
        "global_pool": "map",
        "init_values": 0.1,
    },
    "mixed": {**ROPE, "attn_type": "rope", "rope_type": "mixed", "init_values": 0.1},
    "mrope": {**ROPE, "attn_type": "rope", "rope_type": "mrope", "rope_mrope_section": (0, 2, 2)},
    "rope_unfused": {**ROPE, "attn_type": "rope", "qkv_fused": False, "rope_rotate_half": True},
    "grouped_query": {
        **ROPE,
        "attn_type": "rope",
        "num_kv_heads": 1,
        "qkv_fused": False,
        "qk_norm": True,
        "init_values": 0.1,
        "attn_only_layer_scale": True,
    },
    "qk_norm": {**ROPE, "qk_norm": True},
    "dynamic": {**ROPE, "dynamic_img_size": True},
}
BEIT: dict[str, dict[str, Any]] = {
    "beit": {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1},
    "beit_token": {"use_rel_pos_bias": True, "global_pool": "token", "qkv_bias": False},
    "beit_swiglu": {"use_rel_pos_bias": True, "swiglu_mlp": True, "scale_mlp": True},
    "beit_shared": {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": 0.1},
    "beit_both": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True},
    "beit_absolute": {"use_abs_pos_emb": True},
}
RELPOS: dict[str, dict[str, Any]] = {
    "relpos_bias": {"rel_pos_type": "bias", "init_values": 0.1},
    "relpos_bias_cls": {"rel_pos_type": "bias", "class_token": True, "global_pool": "token"},
    "relpos_mlp": {"rel_pos_type": "mlp", "rel_pos_dim": 7},
    "relpos_mlp_cls": {"rel_pos_type": "mlp_swin", "rel_pos_dim": 7, "class_token": True},
    "relpos_shared": {"rel_pos_type": "mlp", "rel_pos_dim": 7, "shared_rel_pos": True},
    "relpos_post_norm": {"rel_pos_type": "bias", "block_fn": vision_transformer_relpos.ResPostRelPosBlock},
}


def _gated(model: nn.Module) -> None:
    norm = partial(nn.LayerNorm, eps=1e-6)
    model.blocks[1] = eva.EvaBlock(24, 3, gated_attn=True, norm_layer=norm, init_values=0.1)


def _separate_bias(model: nn.Module) -> None:
    for block in model.blocks:
        block.attn.qkv_bias_separate = True


CHANGED: dict[str, tuple[type[nn.Module], dict[str, Any], Callable[[nn.Module], None]]] = {
    "gated": (eva.Eva, ROPE, _gated),
    "eva_separate_bias": (eva.Eva, ROPE, _separate_bias),
    "beit_separate_bias": (beit.Beit, BEIT["beit"], _separate_bias),
}
FAMILIES = ((eva.Eva, EVA), (beit.Beit, BEIT), (vision_transformer_relpos.VisionTransformerRelPos, RELPOS))
NAMES = (*EVA, *BEIT, *RELPOS, *CHANGED)
HEADLESS = ("inner_norm", "mixed", "grouped_query", "beit_shared", "beit_both", "relpos_shared")
"""Variants whose heads cannot be cut exactly."""


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny model of one variant, every parameter far from where it starts."""
    torch.manual_seed(0)
    if name in CHANGED:
        kind, options, change = CHANGED[name]
    else:
        kind, options = next((kind, known[name]) for kind, known in FAMILIES if name in known)
        change = None
    _skip_unless(kind, options)
    if name == "gated":
        _skip_unless(eva.EvaBlock, {"gated_attn": True})
    if name == "mixed" and dtype == torch.float64:
        needs("timm", "1.0.31")  # before, it rotates with a product of float32 and float64
    model = kind(**SIZES, **options)
    if change is not None:
        change(model)
    _randomise(model)
    return model.to(dtype).eval()


def _skip_unless(kind: type[nn.Module], options: dict[str, Any]) -> None:
    unknown = set(options) - set(inspect.signature(kind.__init__).parameters)
    if unknown:
        pytest.skip(f"this timm's {kind.__name__} has no {', '.join(sorted(unknown))}")


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """LayerScale starts near 0, biases and tables at 0: one that is left out would not show."""
    post_norm = isinstance(
        model.blocks[0], (eva.EvaBlockPostNorm, vision_transformer_relpos.ResPostRelPosBlock)
    )
    spread = (
        0.5 if post_norm else 1.5
    )  # without a norm in front of it, attention would saturate and scores tie
    for name, values in model.named_parameters():
        if values.dim() == 1:
            values.uniform_(0.5, 1.5)
        elif "table" in name or values.dim() != 2:
            values.normal_(0, 1)
        else:
            values.normal_(0, spread * values.shape[1] ** -0.5)
    for name, values in model.named_buffers():
        if name.endswith("k_bias"):
            values.normal_(0, 1)


def images_for(model: nn.Module, batch: int = 2) -> Tensor:
    """[B 3 32 48]."""
    torch.manual_seed(1)
    return torch.randn(batch, 3, 32, 48, dtype=next(model.parameters()).dtype)


class MaskedAttention:
    """Attention that scores and hides patches as the paper says, on sequences that keep their full length."""

    def __init__(self, keep: Sequence[int], num_prefix: int) -> None:
        self.keep = list(keep)
        self.prefix = num_prefix
        self.alive: Tensor | None = None
        self.total: Tensor | float = 0.0
        self.removes = False

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: object
    ) -> Tensor:
        batch, _heads, tokens, width = query.shape
        alive = torch.ones(batch, tokens, dtype=torch.bool) if self.alive is None else self.alive
        logits = query @ key.transpose(-2, -1) / width**0.5 + (0 if attn_mask is None else attn_mask)
        probs = logits.masked_fill(~alive[:, None, None, :], -torch.inf).softmax(-1)
        asked = probs.masked_fill(~alive[:, None, :, None], 0).amax(2)
        self.total = self.total + asked.sum(1)
        self.alive = self._hide(alive, self.total, self.keep.pop(0))
        return probs @ value

    def _hide(self, alive: Tensor, total: Tensor, keep: int) -> Tensor:
        rows = []
        for image in range(alive.shape[0]):
            patches = [token for token in range(self.prefix, alive.shape[1]) if alive[image, token]]
            ranked = sorted(patches, key=lambda token: -float(total[image, token]))
            scores = total[image, ranked]
            assert keep == len(ranked) or scores[keep - 1] - scores[keep] > 1e-9, "a tie decides nothing"
            rows.append([token < self.prefix or token in ranked[:keep] for token in range(alive.shape[1])])
        return torch.tensor(rows)


@contextmanager
def masked(
    keep: Sequence[int], num_prefix: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MaskedAttention]:
    """Every fused attention inside the ``with`` is the oracle's."""
    oracle = MaskedAttention(keep, num_prefix)
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", oracle)
        yield oracle


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_keeping_everything_is_the_host(name: str, dtype: torch.dtype) -> None:
    result = verify(make(name, dtype))
    assert result.passed, result.summary()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_survivors_equal_the_masked_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    images, prefix = images_for(model), model.num_prefix_tokens
    with masked(KEEP, prefix, monkeypatch) as oracle:
        full = model.forward_features(images)
    assert oracle.alive is not None
    assert not oracle.keep
    expected = full[oracle.alive].view(2, prefix + KEEP[-1], 24)

    prune_(model, PruneConfig(keep_per_block=KEEP))
    with record(model) as trace:
        got = model.forward_features(images)
    survivors = [row.nonzero().flatten().tolist() for row in oracle.alive[:, prefix:]]
    assert trace.survivors[-1].tolist() == survivors
    assert survivors[0] != survivors[1]
    assert (got - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_unprune_restores_bit_for_bit(name: str) -> None:
    model = make(name)
    images = images_for(model)
    before, tensors = model(images), {key: value.clone() for key, value in model.state_dict().items()}
    owners = dict(model.named_parameters())
    if name in HEADLESS:
        prune_(model, PruneConfig(keep_rate=0.4))
    else:
        prune_(model, PruneConfig(keep_rate=0.4, head_keep_rate=0.4), calibration=images)
    assert model(images).shape == before.shape
    unprune_(model)
    assert torch.equal(model(images), before)
    assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())
    assert all(owners[key] is value for key, value in model.named_parameters())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in HEADLESS])
@torch.no_grad()
def test_cut_heads_equal_the_host_without_them(name: str) -> None:
    model = make(name)
    images = images_for(model)
    plan = prune_(
        model, PruneConfig(keep_rate=1.0, head_keep_rate=0.4, schedule="linear-ramp"), calibration=images
    )
    assert plan.heads is not None
    assert [len(kept) for kept in plan.heads] == [2, 2, 1]
    got = model(images)
    unprune_(model)
    for block, kept in zip(model.blocks, plan.heads, strict=True):
        columns = block.attn.proj.weight.view(24, 3, -1)
        columns[:, [head for head in range(3) if head not in kept]] = 0
    expected = model(images)
    assert (got - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("inner_norm", "normalises the joined heads"),
        ("mixed", "rotary embedding is learned for each head"),
        ("grouped_query", "grouped-query"),
        ("beit_shared", "share one relative position bias"),
        ("beit_both", "share one relative position bias"),
        ("relpos_shared", "share one relative position bias"),
    ],
)
def test_heads_that_cannot_be_cut_exactly_are_refused(name: str, reason: str) -> None:
    model = make(name)
    images = images_for(model)
    before = model(images)
    with pytest.raises(UnsupportedModelError, match=f"{reason}.*prune patches only"):
        prune_(model, PruneConfig(head_keep_rate=0.4), calibration=images)
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("name", NAMES)
def test_macs_formula_equals_torch_count(name: str) -> None:
    model = make(name, torch.float32)
    dense = count_macs(model)
    plan = prune_(model, PruneConfig(keep_per_block=KEEP))
    assert count_macs(model) / dense == pytest.approx(plan.macs_ratio, abs=1e-6)


@pytest.mark.parametrize("name", ["eva", "eva02", "gated", "rope_unfused", "beit", "relpos_bias"])
def test_macs_formula_equals_torch_count_with_heads_cut(name: str) -> None:
    model = make(name, torch.float32)
    dense = count_macs(model)
    config = PruneConfig(keep_per_block=KEEP, head_keep_rate=0.4)
    plan = prune_(model, config, calibration=images_for(model))
    assert plan.heads is not None
    assert count_macs(model) / dense == pytest.approx(plan.macs_ratio, abs=1e-6)


COMPILED = ("eva02", "dinov3", "mixed", "grouped_query", "beit", "beit_both", "relpos_mlp_cls")


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_compiles_in_one_graph(name: str) -> None:
    model = make(name)
    images = images_for(model)
    prune_(model, PruneConfig(keep_rate=0.5))
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), expected)


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_exports_with_a_dynamic_batch(name: str) -> None:
    model = make(name)
    prune_(model, PruneConfig(keep_rate=0.5))
    images = images_for(model, 5)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},), strict=False).module()
    for count in (1, 3, 5):
        torch.testing.assert_close(program(images[:count]), model(images[:count]))


@pytest.mark.parametrize("name", ["eva02", "dinov3", "mixed", "beit", "beit_shared", "relpos_mlp"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains(name: str, checkpointing: bool) -> None:
    model = make(name).train()
    prune_(model, PruneConfig(keep_per_block=KEEP), checkpointing=checkpointing)
    model(images_for(model)).square().mean().backward()
    idle = [key for key, values in model.named_parameters() if values.grad is None]
    assert idle == []


@pytest.mark.parametrize("name", ["eva02", "dinov3", "beit", "relpos_bias"])
@torch.no_grad()
def test_half_precision_stays_half(name: str) -> None:
    model = make(name, torch.bfloat16)
    prune_(model, PruneConfig(keep_rate=0.5))
    out = model(images_for(model))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@torch.no_grad()
def test_a_transposed_image_brings_its_own_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("dynamic")
    images = images_for(model).transpose(2, 3)
    with masked(KEEP, 1, monkeypatch) as oracle:
        full = model.forward_features(images)
    assert oracle.alive is not None
    expected = full[oracle.alive].view(2, 1 + KEEP[-1], 24)
    prune_(model, PruneConfig(keep_per_block=KEEP))
    got = model.forward_features(images)
    assert (got - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("name", ["eva02", "beit", "relpos_bias"])
def test_ways_around_the_cascade_are_closed(name: str) -> None:
    model = make(name)
    images = images_for(model)
    prune_(model, PruneConfig(keep_rate=0.5))
    with pytest.raises(PruningBypassError, match="forward_intermediates would lay the patches out as a map"):
        model.forward_intermediates(images)
    with pytest.raises(PruningBypassError, match="prune_intermediate_layers would run the blocks without"):
        model.prune_intermediate_layers(1)
    with pytest.raises(PruningBypassError, match="called directly"):
        model.blocks[0](torch.zeros(1, 25, 24))


def test_a_mask_over_patches_is_refused() -> None:
    model = make("eva02")
    if "attn_mask" not in inspect.signature(model.forward).parameters:
        pytest.skip("this timm's Eva takes no mask")
    prune_(model, PruneConfig(keep_rate=0.5))
    with pytest.raises(ValueError, match="a pruned model cannot take attn_mask"):
        model(images_for(model), attn_mask=torch.ones(2, 1, 25, 25, dtype=torch.bool))


def test_random_patch_dropout_is_refused() -> None:
    for model in (
        eva.Eva(**SIZES, patch_drop_rate=0.5),
        vision_transformer.VisionTransformer(**SIZES, patch_drop_rate=0.5),
    ):
        images = images_for(model)
        prune_(model, PruneConfig(keep_rate=0.5))
        assert model.eval()(images).shape == (2, 5)
        with pytest.raises(PruningBypassError, match=r"random patches while it trains.*patch_drop.prob = 0"):
            model.train()(images)
        model.patch_drop.prob = 0
        assert model(images).shape == (2, 5)


class _OwnAttention(eva.EvaAttention):
    """Somebody's own attention: what it does is not known."""


class _OwnBlock(beit.Block):
    """Somebody's own block."""


def test_custom_attention_and_blocks_are_refused() -> None:
    model = make("eva")
    model.blocks[2].attn.__class__ = _OwnAttention
    with pytest.raises(UnsupportedModelError, match=r"block 2 of Eva uses _OwnAttention.*EvaAttention"):
        open_host(model)
    model = make("beit")
    model.blocks[1].__class__ = _OwnBlock
    with pytest.raises(UnsupportedModelError, match="block 1 of Beit is a _OwnBlock"):
        open_host(model)


def test_real_models_of_other_families_are_refused_with_the_reason() -> None:
    swin = SwinTransformer(img_size=32, patch_size=4, embed_dim=8, depths=(1,), num_heads=(1,), window_size=4)
    with pytest.raises(
        UnsupportedModelError, match=r"SwinTransformer cannot be pruned: it attends inside windows"
    ):
        prune_(swin)
    cait = Cait(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=1)
    with pytest.raises(
        UnsupportedModelError, match="Cait cannot be pruned: its attention is of its own kind"
    ):
        prune_(cait)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SwinTransformerV2", "inside windows"),
        ("SwinForImageClassification", "inside windows"),
        ("Swinv2Model", "inside windows"),
        ("Hiera", "between stages"),
        ("HieraDet", "inside windows"),
        ("HieraForImageClassification", "between stages"),
        ("MultiScaleVit", "between stages"),
        ("MViT", "between stages"),
        ("PvtV2ForImageClassification", "between stages"),
        ("ConvNeXt", "convolves"),
        ("ConvNextV2Model", "convolves"),
        ("ResNet", "convolves"),
        ("Levit", "hybrid.*attention biases"),
        ("LevitDistilled", "hybrid.*attention biases"),
        ("MobileViTForImageClassification", "hybrid"),
        ("NextViT", "hybrid"),
        ("Xcit", "between channels"),
        ("VOLO", "outlook"),
        ("VisionTransformerSAM", "inside windows"),
        ("Gemma4VisionModel", "coordinates"),
        ("Gemma3Model", GENERAL),
        ("Qwen3VitEncoder", "full patch grid"),
        ("FeatureGetterNet", "inner blocks"),
        ("DataParallel", r"model\.module"),
        ("OptimizedModule", r"model\._orig_mod"),
        ("GraphModule", "traced"),
        ("Sampler", GENERAL),
        ("Linear", GENERAL),
    ],
)
def test_refusals_name_the_model_and_the_reason(name: str, reason: str) -> None:
    model = type(name, (nn.Module,), {})()
    with pytest.raises(UnsupportedModelError, match=f"{name} cannot be pruned: .*{reason}.*Supported: timm"):
        open_host(model)


def test_a_block_without_an_attention_of_its_own_is_refused() -> None:
    model = vision_transformer.VisionTransformer(img_size=32, embed_dim=8, depth=2, num_heads=1)
    model.blocks[1] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="block 1 of VisionTransformer is a Identity"):
        open_host(model)


def test_a_class_derived_from_a_refused_one_gets_its_reason() -> None:
    model = type("MyDetector", (type("ResNet", (nn.Module,), {}),), {})()
    with pytest.raises(UnsupportedModelError, match="MyDetector cannot be pruned: it convolves"):
        open_host(model)
