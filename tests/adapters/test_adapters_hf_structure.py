"""Encoders of Hugging Face transformers that no table names: recognised by their parts, or refused by name.

Sizes: patches of 8 pixels on a 4 x 4 grid, C=24 channels in H=3 heads, 3 layers. The oracle lets no token leave: it
runs the host's own layers and hides removed patches from the next layer on by a mask.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cpvit
from cpvit.adapters import UnsupportedModelError, open_host
from cpvit.adapters.hf_parts import layer_parts, part
from cpvit.measure.support import randomize_
from cpvit.plans.costs import cost_model
from cpvit.plans.macs import count_macs

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8, "num_labels": 7}
VIDEO = {**IMAGE, "num_frames": 4}


def found(name: str) -> Any:
    """A class of transformers; "folder:Class" for one that is not exported."""
    folder, _, kind = name.rpartition(":")
    if not folder:
        return getattr(transformers, kind)
    return getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), kind)


def build(name: str, **values: object) -> nn.Module:
    """A model whose every weight matters, in float64."""
    torch.manual_seed(0)
    kind = found(name)
    model = kind(kind.config_class(**{**IMAGE, **values}))
    randomize_(model)
    return model.double().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dinov3": lambda: build("DINOv3ViTModel", num_register_tokens=2, layerscale_value=0.7),
    "dinov3 gated": lambda: build("DINOv3ViTModel", use_gated_mlp=True, key_bias=True),
    "beit": lambda: build("BeitModel", use_relative_position_bias=True),
    "beit shared": lambda: build("BeitModel", use_shared_relative_position_bias=True),
    "beit both": lambda: build(
        "BeitForImageClassification",
        use_relative_position_bias=True,
        use_shared_relative_position_bias=True,
    ),
    "data2vec": lambda: build("Data2VecVisionForImageClassification", use_relative_position_bias=True),
    "data2vec shared": lambda: build("Data2VecVisionModel", use_shared_relative_position_bias=True),
    "mae": lambda: build("ViTMAEModel", mask_ratio=0.0),
    "msn": lambda: build("ViTMSNForImageClassification"),
    "ijepa": lambda: build("IJepaForImageClassification"),
    "aimv2": lambda: build("Aimv2VisionModel"),
    "internvl": lambda: build("InternVLVisionModel", use_qk_norm=True, layer_scale_init_value=0.4),
    "janus": lambda: build("JanusVisionModel", mlp_ratio=2),
    "chinese clip": lambda: build("ChineseCLIPVisionModel"),
    "altclip": lambda: build("AltCLIPVisionModel"),
    "metaclip 2": lambda: build("MetaClip2VisionModelWithProjection", projection_dim=5),
    "blip": lambda: build("BlipVisionModel"),
    "blip 2": lambda: build("Blip2VisionModel"),
    "owlvit": lambda: build("OwlViTVisionModel"),
    "kosmos 2": lambda: build("kosmos2:Kosmos2VisionModel"),
    "mlcd": lambda: build("MLCDVisionModel"),
    "flava": lambda: build("FlavaImageModel"),
    "idefics3": lambda: build("Idefics3VisionTransformer"),
    "videomae": lambda: build("VideoMAEForVideoClassification", **VIDEO, tubelet_size=2),
    "vivit": lambda: build("VivitModel", **VIDEO, tubelet_size=[2, 8, 8]),
    "dpt": lambda: build("DPTModel"),
}
PREFIX = {"dinov3": 3, "dinov3 gated": 1, "ijepa": 0, "aimv2": 0, "janus": 0, "idefics3": 0, "videomae": 0}


def images_for(model: nn.Module, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    host = open_host(model)
    return torch.randn(batch, *host.image_shape, generator=generator).to(host.dtype)


def output(model: nn.Module, images: Tensor) -> Tensor:
    torch.manual_seed(0)  # ViT-MAE shuffles its patches
    with torch.no_grad():
        return open_host(model).output(model(images))


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_git_is_the_same_in_float32() -> None:
    """Its attention computes the softmax in float32 whatever the model is in."""
    result = cpvit.verify(build("GitVisionModel").float())
    assert result.error < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeping_everything_changes_nothing(name: str, dtype: torch.dtype) -> None:
    result = cpvit.verify(MODELS[name]().to(dtype))
    assert result.passed, result.summary()
    assert result.error < 1e-5


def test_prefix_and_patches_are_the_hosts(name: str) -> None:
    model = MODELS[name]()
    host, tokens = open_host(model), []
    hook = host.blocks[0].module.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    model(images_for(model))
    hook.remove()
    assert host.num_prefix == PREFIX.get(name, 1)
    assert tokens == [host.num_tokens]
    assert host.num_patches == (32 if name in ("videomae", "vivit") else 16)


def test_an_image_alone_is_the_same_as_in_a_batch(name: str) -> None:
    if name == "mae":
        pytest.skip("its shuffle of the patches depends on the batch")
    model = MODELS[name]()
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    images = images_for(model, 3)
    torch.testing.assert_close(output(model, images[1:2]), output(model, images)[1:2], rtol=1e-9, atol=1e-9)


def test_restoring_is_exact(name: str) -> None:
    model = MODELS[name]()
    before, images = {key: value.clone() for key, value in model.state_dict().items()}, images_for(model)
    expected = output(model, images)
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    assert not torch.equal(output(model, images), expected)
    cpvit.unprune_(model)
    assert torch.equal(output(model, images), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_counted_macs_equal_the_planned_ones(name: str) -> None:
    model = MODELS[name]().float()
    costs, dense = cost_model(open_host(model)), count_macs(model)
    plan = cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    assert count_macs(model) == costs.total(plan.patches_per_block) < dense


MASKED = ("dinov3", "dinov3 gated", "beit", "beit shared", "aimv2", "chinese clip", "metaclip 2", "mlcd")


@torch.no_grad()
def masked_host(model: Any, images: Tensor, keep: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The paper's cascade by the host's own layers: tokens [B N C] of the last one, and alive [B N]."""
    host, entering, probs = open_host(model), [], []
    layers = [block.module for block in host.blocks]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append((args, kwargs))

    hook = layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    model(images)
    hook.remove()
    (x, *others), extra = entering[0]
    extra |= dict(zip(host.positional, others, strict=False))
    shared, num_prefix = extra.get("attention_mask"), host.num_prefix
    alive = torch.ones(x.shape[:2], dtype=torch.bool)
    score = torch.zeros(x.shape[:2], dtype=torch.float64)
    for layer, count in zip(layers, keep, strict=True):
        attention = part(layer, layer_parts(layer).attention)
        hook = attention.register_forward_hook(lambda _module, _args, result: probs.append(result[1]))
        mask = torch.zeros(x.shape[:2], dtype=x.dtype).masked_fill(~alive, -torch.inf)[:, None, None]
        mask = mask.expand(-1, -1, x.shape[1], -1)
        x = layer(x, **{**extra, "attention_mask": mask if shared is None else shared + mask})
        hook.remove()
        for image in range(len(x)):
            score[image] += probs[-1][image][:, alive[image]].amax(dim=1).sum(dim=0)
        ranking = score.masked_fill(~alive, -torch.inf)[:, num_prefix:]
        kept = ranking.argsort(dim=1, descending=True)[:, :count] + num_prefix
        alive = torch.zeros_like(alive).scatter(1, kept, True)
        alive[:, :num_prefix] = True
    return x, alive


@pytest.mark.parametrize("name", MASKED)
def test_survivors_equal_those_of_a_masked_host(name: str) -> None:
    model, keep = MODELS[name](), (11, 6, 6)
    model.set_attn_implementation("eager")  # the layers then return their probabilities
    images, host = images_for(model, 3), open_host(model)
    tokens, alive = masked_host(model, images, keep)
    expected = torch.stack([row[here] for row, here in zip(tokens, alive, strict=True)])
    leaving: list[Tensor] = []
    host.blocks[-1].module.register_forward_hook(lambda _module, _args, result: leaving.append(result))
    cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=keep), verify=False)
    with cpvit.record(model) as trace, torch.no_grad():
        model(images)
    positions = torch.stack([row[host.num_prefix :].nonzero().flatten() for row in alive])
    assert torch.equal(trace.survivors[-1], positions)
    torch.testing.assert_close(
        leaving[-1], expected, rtol=1e-5, atol=1e-5
    )  # eager attention is float32 in part


CUT = ((0, 2), (1, 2), (1,))
UNCUT = {
    "beit shared": "one relative position",
    "beit both": "one relative",
    "data2vec shared": "one relative",
}
UNCUT |= {"internvl": "normalises the queries of all heads together"}


def test_cut_heads_equal_zeroed_columns_of_the_projection(name: str) -> None:
    model, reference = MODELS[name](), MODELS[name]()
    plan = dataclasses.replace(cpvit.prune_(model, cpvit.PruneConfig(keep_rate=1.0)), heads=CUT)
    if name in UNCUT:
        with pytest.raises(UnsupportedModelError, match=UNCUT[name]):
            cpvit.prune_(model, plan)
        return
    for block, kept in zip(open_host(reference).blocks, CUT, strict=True):
        for head in set(range(3)) - set(kept):
            block.projection.weight.data[:, 8 * head : 8 * head + 8] = 0  # type: ignore[attr-defined]
    cpvit.prune_(model, plan)
    images = images_for(model)
    torch.testing.assert_close(output(model, images), output(reference, images), rtol=1e-9, atol=1e-9)


def test_padded_patches_of_idefics3_are_never_attended_to_and_leave_first() -> None:
    model: Any = MODELS["idefics3"]()
    images, mask = images_for(model), torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, 2:] = False
    cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=(16, 8, 8)))
    with cpvit.record(model) as trace, torch.no_grad():
        whole = model(images, patch_attention_mask=mask).last_hidden_state
        images[1, :, 16:] = 5.0  # what the padding holds must not matter
        again = model(images, patch_attention_mask=mask).last_hidden_state
    assert trace.survivors[-1][1].tolist() == list(range(8))
    torch.testing.assert_close(again, whole)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Dinov2Backbone", {"layerscale_value": 0.7}),
        ("Dinov2WithRegistersBackbone", {}),
        ("DINOv3ViTBackbone", {"num_register_tokens": 2}),
        ("BeitBackbone", {"use_relative_position_bias": True}),
    ],
)
def test_backbones_give_maps_of_dense_features(kind: str, options: dict[str, object]) -> None:
    model: Any = build(kind, out_features=["stage1", "stage3"], **options)
    images = images_for(model)
    with torch.no_grad():
        expected = model(images).feature_maps
    with pytest.raises(ValueError, match=r"needs every patch in its place .* give dense_features=True"):
        cpvit.prune_(model)
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=1.0), dense_features=True)
    for got, there in zip(model(images).feature_maps, expected, strict=True):
        torch.testing.assert_close(got, there)
    cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=(12, 9, 5)), dense_features=True)
    assert [tuple(grid.shape) for grid in model(images).feature_maps] == [(2, 24, 4, 4)] * 2


def test_depth_is_estimated_on_a_pruned_backbone() -> None:
    """The decoder reads maps of inner stages: it runs unchanged."""
    size = {"image_size": 64, "num_hidden_layers": 4}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.Dinov2Config(
        **{**IMAGE, **size}, out_features=stages, reshape_hidden_states=False
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=24,
        patch_size=8,
        neck_hidden_sizes=[8, 8, 8, 8],
        reassemble_factors=[4, 2, 1, 0.5],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    torch.manual_seed(0)
    model = transformers.DepthAnythingForDepthEstimation(config).eval()
    randomize_(model)
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(
        UnsupportedModelError, match=r"its neck .*prune_\(model.backbone, ..., dense_features=True"
    ):
        open_host(model)
    with torch.no_grad():
        expected = model(images).predicted_depth
        cpvit.prune_(model.backbone, cpvit.PruneConfig(keep_rate=1.0), dense_features=True)
        torch.testing.assert_close(model(images).predicted_depth, expected)
        cpvit.prune_(model.backbone, cpvit.PruneConfig(macs=0.7), dense_features=True)
        pruned = model(images).predicted_depth
    assert pruned.shape == expected.shape
    assert not torch.equal(pruned, expected)


def swin() -> nn.Module:
    return transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[1]))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build("ViTMAEModel"), "embeddings drop 75% of the patches by chance.*mask_ratio = 0"),
        (
            lambda: build("YolosModel", image_size=[32, 32]),
            r"its encoder.interpolation .* may need every patch in its place",
        ),
        (
            lambda: build("YolosModel", image_size=[32, 32], use_mid_position_embeddings=False),
            "detection_tokens stand behind",
        ),
        (lambda: build("PixtralVisionModel"), "packs the images of a batch into one sequence"),
        (lambda: build("XCLIPVisionModel"), r"XCLIPVisionEncoderLayer has a message_fc \(Linear\)"),
        (lambda: build("BeitForMaskedImageModeling"), "its lm_head"),
        (lambda: build("TimesformerModel"), r"TimesformerLayer has a \S+ \(\w+\), and cpvit does not know"),
        (swin, "attends inside windows of the full patch grid and merges"),
        (lambda: build("ResNetModel"), "it convolves"),
    ],
)
def test_what_is_not_understood_is_named(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"\w+ cannot be pruned: .*{reason}"):
        open_host(make())


def test_a_part_that_no_one_knows_is_named() -> None:
    model: Any = MODELS["dinov3"]()
    model.model.layer[1].attention.sinks = nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedModelError, match=r"DINOv3ViTLayer has a attention.sinks \(Parameter\)"):
        open_host(model)


def test_a_cascade_that_does_not_run_is_a_failed_verification() -> None:
    model: Any = MODELS["data2vec"]()
    host = dataclasses.replace(open_host(model), in_tuple=False)
    with pytest.raises(cpvit.VerificationError, match="its blocks do not run in the cascade"):
        cpvit.pruning.verify.verify_host(host)


def test_saved_and_loaded_under_the_module_of_a_class_that_is_not_exported(tmp_path: Any) -> None:
    model = MODELS["kosmos 2"]()
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    cpvit.save_pruned(model, tmp_path)
    images = images_for(model)
    assert torch.equal(output(cpvit.load_pruned(tmp_path), images), output(model, images))
