"""Every layout is written here by renaming a model's tensors independently of the library, and read back."""

from __future__ import annotations

import argparse
import os
import pickle
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import shared_path
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cpvit.weights.loading import CheckpointReport, load_checkpoint
from cpvit.weights.reading import CheckpointError, head_classes

State = dict[str, Tensor]
Names = dict[str, Any]

# Distinct sizes, so that a swapped axis cannot pass: width 24, 3 heads of 8, MLP 40, 7 classes, 4x4 patches.
WIDTH, HEADS, DEPTH, CLASSES = 24, 3, 2, 7


def vit(
    cls: type[VisionTransformer] = VisionTransformer, *, seed: int = 0, **changes: Any
) -> VisionTransformer:
    """A tiny model in which every parameter is random (timm starts biases and class tokens at zero)."""
    options: Names = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": 40 / WIDTH,
        "num_classes": CLASSES,
    }
    model = cls(**{**options, **changes}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def distilled(**changes: Any) -> VisionTransformer:
    return vit(VisionTransformerDistilled, **changes)


def images(size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(9))


def save(state: Any, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, file)
    else:
        torch.save(state, file)
    return file


@torch.no_grad()
def assert_same_output(source: nn.Module, loaded: nn.Module, size: tuple[int, int] = (32, 32)) -> None:
    torch.testing.assert_close(loaded(images(size)), source(images(size)), rtol=0, atol=0)


def assert_unchanged(model: nn.Module, before: State) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def copied(model: nn.Module) -> State:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


# --- writers: a timm state dict in other people's names -------------------------------------------


def rows(state: State, index: int, part: int, kind: str) -> Tensor:
    """Query, key or value of a block, cut from timm's fused tensor."""
    return state[f"blocks.{index}.attn.qkv.{kind}"][part * WIDTH : (part + 1) * WIDTH].clone()


def seed_layout(state: State) -> State:
    out = {
        "transformer.embeddings.cls_token": state["cls_token"],
        "transformer.embeddings.position_embeddings": state["pos_embed"],
    }
    for kind in ("weight", "bias"):
        out[f"transformer.embeddings.patch_embeddings.{kind}"] = state[f"patch_embed.proj.{kind}"]
        out[f"transformer.encoder.encoder_norm.{kind}"] = state[f"norm.{kind}"]
        out[f"head.{kind}"] = state[f"head.{kind}"]
        for i in range(DEPTH):
            layer = f"transformer.encoder.layer.{i}"
            out[f"{layer}.attention_norm.{kind}"] = state[f"blocks.{i}.norm1.{kind}"]
            out[f"{layer}.ffn_norm.{kind}"] = state[f"blocks.{i}.norm2.{kind}"]
            for part, name in enumerate(("query", "key", "value")):
                out[f"{layer}.attn.{name}.{kind}"] = rows(state, i, part, kind)
            out[f"{layer}.attn.out.{kind}"] = state[f"blocks.{i}.attn.proj.{kind}"]
            for fc in ("fc1", "fc2"):
                out[f"{layer}.ffn.{fc}.{kind}"] = state[f"blocks.{i}.mlp.{fc}.{kind}"]
    return out


HF4: Names = {
    "layers": "encoder.layer",
    "qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
HF5: Names = {
    "layers": "layers",
    "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "proj": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def hf_layout(state: State, names: Names, prefix: str) -> State:
    out = {
        f"{prefix}embeddings.cls_token": state["cls_token"],
        f"{prefix}embeddings.position_embeddings": state["pos_embed"],
    }
    for kind in ("weight", "bias"):
        out[f"{prefix}embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        out[f"{prefix}layernorm.{kind}"] = state[f"norm.{kind}"]
        for i in range(DEPTH):
            layer = f"{prefix}{names['layers']}.{i}"
            out[f"{layer}.layernorm_before.{kind}"] = state[f"blocks.{i}.norm1.{kind}"]
            out[f"{layer}.layernorm_after.{kind}"] = state[f"blocks.{i}.norm2.{kind}"]
            for part, name in enumerate(names["qkv"]):
                out[f"{layer}.{name}.{kind}"] = rows(state, i, part, kind)
            out[f"{layer}.{names['proj']}.{kind}"] = state[f"blocks.{i}.attn.proj.{kind}"]
            for fc in ("fc1", "fc2"):
                out[f"{layer}.{names[fc]}.{kind}"] = state[f"blocks.{i}.mlp.{fc}.{kind}"]
    return out


def hf_vit(state: State, names: Names, prefix: str = "vit.") -> State:
    out = hf_layout(state, names, prefix)
    return {**out, "classifier.weight": state["head.weight"], "classifier.bias": state["head.bias"]}


def hf_deit(state: State, names: Names) -> State:
    out = hf_layout(state, names, "deit.")
    out["deit.embeddings.distillation_token"] = state["dist_token"]
    for kind in ("weight", "bias"):
        out[f"cls_classifier.{kind}"] = state[f"head.{kind}"]
        out[f"distillation_classifier.{kind}"] = state[f"head_dist.{kind}"]
    return out


def google_layout(
    state: State, *, prefix: str = "", mha: int = 1, mlp: int = 3, norm: int = 2
) -> dict[str, np.ndarray]:
    head_dim = WIDTH // HEADS
    out = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    if "head.weight" in state:
        out |= {"head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}
    for i in range(DEPTH):
        block, layer = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", f"LayerNorm_{norm}")):
            out[f"{layer}/{theirs}/scale"] = state[f"{block}.{ours}.weight"]
            out[f"{layer}/{theirs}/bias"] = state[f"{block}.{ours}.bias"]
        attention = f"{layer}/MultiHeadDotProductAttention_{mha}"
        for part, name in enumerate(("query", "key", "value")):
            out[f"{attention}/{name}/kernel"] = rows(state, i, part, "weight").T.reshape(
                WIDTH, HEADS, head_dim
            )
            out[f"{attention}/{name}/bias"] = rows(state, i, part, "bias").reshape(HEADS, head_dim)
        out[f"{attention}/out/kernel"] = state[f"{block}.attn.proj.weight"].T.reshape(HEADS, head_dim, WIDTH)
        out[f"{attention}/out/bias"] = state[f"{block}.attn.proj.bias"]
        for number, fc in enumerate(("fc1", "fc2")):
            dense = f"{layer}/MlpBlock_{mlp}/Dense_{number}"
            out[f"{dense}/kernel"] = state[f"{block}.mlp.{fc}.weight"].T
            out[f"{dense}/bias"] = state[f"{block}.mlp.{fc}.bias"]
    return {prefix + key: tensor.contiguous().numpy() for key, tensor in out.items()}


def stacked(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Blocks as one scanned layer, and the position embedding at the top: how big_vision saves."""
    first = f"{prefix}Transformer/encoderblock_0/"
    out = {key: value for key, value in arrays.items() if "/encoderblock_" not in key}
    out[f"{prefix}pos_embedding"] = out.pop(f"{prefix}Transformer/posembed_input/pos_embedding")
    for key in [key for key in arrays if key.startswith(first)]:
        layers = [arrays[key.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(DEPTH)]
        out[key.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    return out


def write_npz(file: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(file, **arrays)
    return file


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "bin", "ckpt", "pth.tar"])
def test_timm_state_dict_in_every_torch_format(tmp_path: Path, suffix: str) -> None:
    source, model = vit(), vit(seed=1)
    file = save(source.state_dict(), tmp_path / f"weights.{suffix}")
    assert load_checkpoint(model, file) == CheckpointReport(file, "timm")
    assert_same_output(source, model)


def test_torch_files_from_before_1_6(tmp_path: Path) -> None:
    source, model = vit(), vit(seed=1)
    torch.save(source.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_checkpoint(model, tmp_path / "old.pth")
    assert_same_output(source, model)


def test_path_may_be_a_string(tmp_path: Path) -> None:
    source, model = vit(), vit(seed=1)
    load_checkpoint(model, str(save(source.state_dict(), tmp_path / "w.pth")))
    assert_same_output(source, model)


@pytest.mark.parametrize("entry", ["state_dict", "model_state_dict", "state_dict_ema", "model_ema", "model"])
def test_wrapped_state_dicts(tmp_path: Path, entry: str) -> None:
    source, model = vit(), vit(seed=1)
    content = {entry: source.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    report = load_checkpoint(model, save(content, tmp_path / "w.pth"))
    assert report.entry == entry
    assert report.layout == ("deit" if entry == "model" else "timm")
    assert_same_output(source, model)


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("plain", ["state_dict", "model_state_dict", "model"])
def test_every_name_of_averaged_weights_comes_before_the_others(
    tmp_path: Path, averaged: str, plain: str
) -> None:
    source, model = vit(), vit(seed=1)
    content = {plain: vit(seed=2).state_dict(), averaged: source.state_dict()}
    assert load_checkpoint(model, save(content, tmp_path / "w.pth")).entry == averaged
    assert_same_output(source, model)


def test_averaged_weights_come_first_and_the_report_says_so(tmp_path: Path) -> None:
    source, model = vit(), vit(seed=1)
    content = {"state_dict": vit(seed=2).state_dict(), "state_dict_ema": source.state_dict()}
    report = load_checkpoint(model, save(content, tmp_path / "w.pth"))
    assert report.summary() == "w.pth: timm layout; weights from 'state_dict_ema'"
    assert_same_output(source, model)


def test_empty_averaged_weights_are_passed_over(tmp_path: Path) -> None:
    source, model = vit(), vit(seed=1)
    content = {"model": source.state_dict(), "model_ema": None}
    assert load_checkpoint(model, save(content, tmp_path / "w.pth")).entry == "model"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes(tmp_path: Path, prefix: str) -> None:
    source, model = vit(), vit(seed=1)
    state = {prefix + key: tensor for key, tensor in source.state_dict().items()}
    load_checkpoint(model, save(state, tmp_path / "w.pth"))
    assert_same_output(source, model)


def test_deit_distilled(tmp_path: Path) -> None:
    source, model = distilled(), distilled(seed=1)
    report = load_checkpoint(model, save({"model": source.state_dict()}, tmp_path / "deit.pth"))
    assert report.layout == "deit"
    assert_same_output(source, model)


def test_deit3_layer_scale(tmp_path: Path) -> None:
    options: Names = {"init_values": 1e-4, "no_embed_class": True}
    source, model = vit(**options), vit(seed=1, **options)
    names = {f"blocks.{i}.ls{n}.gamma": f"blocks.{i}.gamma_{n}" for i in range(DEPTH) for n in (1, 2)}
    state = {names.get(key, key): tensor for key, tensor in source.state_dict().items()}
    load_checkpoint(model, save({"model": state}, tmp_path / "deit3.pth"))
    assert_same_output(source, model)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_seed(tmp_path: Path, suffix: str) -> None:
    source, model = vit(), vit(seed=1)
    report = load_checkpoint(model, save(seed_layout(source.state_dict()), tmp_path / f"seed.{suffix}"))
    assert report.layout == "seed"
    assert_same_output(source, model)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("names", [HF4, HF5], ids=["v4", "v5"])
def test_hf_vit(tmp_path: Path, names: Names, suffix: str) -> None:
    source, model = vit(), vit(seed=1)
    report = load_checkpoint(model, save(hf_vit(source.state_dict(), names), tmp_path / f"hf.{suffix}"))
    assert report.layout == "hf"
    assert_same_output(source, model)


@pytest.mark.parametrize("names", [HF4, HF5], ids=["v4", "v5"])
def test_hf_deit_distilled(tmp_path: Path, names: Names) -> None:
    source, model = distilled(), distilled(seed=1)
    load_checkpoint(model, save(hf_deit(source.state_dict(), names), tmp_path / "hf.safetensors"))
    assert_same_output(source, model)


@pytest.mark.parametrize("names", [HF4, HF5], ids=["v4", "v5"])
def test_hf_backbone_without_prefix_ignores_its_pooler(tmp_path: Path, names: Names) -> None:
    source, model = vit(num_classes=0), vit(seed=1, num_classes=0)
    state = hf_layout(source.state_dict(), names, "")
    state |= {"pooler.dense.weight": torch.zeros(2, 2), "embeddings.mask_token": torch.zeros(1, 1, WIDTH)}
    report = load_checkpoint(model, save(state, tmp_path / "hf.bin"))
    assert report.ignored == ("pooler.dense.weight", "embeddings.mask_token")
    assert_same_output(source, model)


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_google_npz(tmp_path: Path, prefix: str) -> None:
    source, model = vit(), vit(seed=1)
    file = write_npz(tmp_path / "ViT.npz", google_layout(source.state_dict(), prefix=prefix))
    assert load_checkpoint(model, file).layout == "google-npz"
    assert_same_output(source, model)


@pytest.mark.parametrize("scan", [False, True], ids=["blocks", "scanned"])
def test_big_vision_npz(tmp_path: Path, scan: bool) -> None:
    source, model = vit(), vit(seed=1)
    arrays = google_layout(source.state_dict(), prefix="params/", mha=0, mlp=0, norm=1)
    file = write_npz(tmp_path / "bv.npz", stacked(arrays, "params/") if scan else arrays)
    load_checkpoint(model, file)
    assert_same_output(source, model)


def test_google_npz_agrees_with_timms_own_reader(tmp_path: Path) -> None:
    ours, theirs = vit(seed=1), vit(seed=2)
    file = write_npz(tmp_path / "ViT.npz", google_layout(vit().state_dict()))
    load_checkpoint(ours, file)
    theirs.load_pretrained(str(file))
    assert_unchanged(ours, theirs.state_dict())


def test_dinov2_with_registers(tmp_path: Path) -> None:
    options: Names = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5, "num_classes": 0}
    source, model = vit(**options), vit(seed=1, **options)
    state = copied(source)
    class_position = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(4))
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([class_position, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, WIDTH)
    report = load_checkpoint(model, save(state, tmp_path / "dino.pth"))
    assert (report.layout, report.ignored) == ("dinov2", ("mask_token",))
    with torch.no_grad():
        source.cls_token += class_position
    assert_same_output(source, model)


def test_dinov2_swiglu(tmp_path: Path) -> None:
    from timm.layers import SwiGLUPacked

    options: Names = {"mlp_layer": SwiGLUPacked, "num_classes": 0}
    source, model = vit(**options), vit(seed=1, **options)
    state = {
        key.replace("fc1", "w12").replace("fc2", "w3"): tensor for key, tensor in source.state_dict().items()
    }
    load_checkpoint(model, save({**state, "mask_token": torch.zeros(1, WIDTH)}, tmp_path / "dino.pth"))
    assert_same_output(source, model)


def clip_layout(state: State) -> State:
    names = [
        ("patch_embed.proj", "conv1"),
        ("blocks.", "transformer.resblocks."),
        ("norm_pre", "ln_pre"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("pos_embed", "positional_embedding"),
        ("cls_token", "class_embedding"),
    ]
    out = {}
    for key, tensor in state.items():
        name = key.replace("norm.", "ln_post.") if key.startswith("norm.") else key
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        out[f"visual.{name}"] = tensor
    out["visual.class_embedding"] = out["visual.class_embedding"].flatten()
    out["visual.positional_embedding"] = out["visual.positional_embedding"][0]
    out["visual.proj"] = out.pop("visual.head.weight").T.contiguous()
    del out["visual.head.bias"]
    return out


def test_clip_image_tower(tmp_path: Path) -> None:
    source, model = vit(pre_norm=True), vit(seed=1, pre_norm=True)
    with torch.no_grad():
        source.head.bias.zero_()  # CLIP's projection has no bias
    state = clip_layout(source.state_dict())
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(5), "logit_scale": torch.tensor(1.0)}
    report = load_checkpoint(model, save({**state, **text}, tmp_path / "clip.safetensors"))
    assert (report.layout, set(report.ignored)) == ("clip", set(text))
    assert_same_output(source, model)


def test_mae_pretraining_file(tmp_path: Path) -> None:
    source, model = vit(num_classes=0), vit(seed=1, num_classes=0)
    extra = {"mask_token": torch.zeros(1, 1, 5), "decoder_embed.weight": torch.zeros(5, WIDTH)}
    report = load_checkpoint(model, save({"model": {**source.state_dict(), **extra}}, tmp_path / "mae.pth"))
    assert (report.layout, set(report.ignored)) == ("mae", set(extra))
    assert_same_output(source, model)


@pytest.mark.parametrize(
    "name", ["test_efficientnet.r160_in1k", "eva02_tiny_patch14_224", "beit_base_patch16_224"]
)
def test_other_timm_models_load_their_own_files(tmp_path: Path, name: str) -> None:
    small = {"embed_dim": 24, "depth": 1, "num_heads": 3} if "patch" in name else {}
    models = [timm.create_model(name, num_classes=7, **small) for _ in range(2)]
    report = load_checkpoint(models[1], save(models[0].state_dict(), tmp_path / "w.safetensors"))
    assert report.layout == "timm"
    assert_unchanged(models[1], models[0].state_dict())


def test_any_module_loads_its_own_file(tmp_path: Path) -> None:
    models = [nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)) for _ in range(2)]
    assert load_checkpoint(models[1], save(models[0].state_dict(), tmp_path / "w.pth")).layout == "native"
    assert_unchanged(models[1], models[0].state_dict())


# --- Hugging Face's own models --------------------------------------------------------------------


def hf_pair(architecture: str) -> tuple[Any, VisionTransformer]:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 40,
    }
    # timm's LayerNorm epsilon; Hugging Face's default of 1e-12 is not in any file.
    options = {"image_size": 32, "patch_size": 8, "num_labels": CLASSES, "layer_norm_eps": 1e-6}
    config = getattr(transformers, "DeiTConfig" if "DeiT" in architecture else "ViTConfig")(
        **sizes, **options
    )
    torch.manual_seed(0)
    source = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return source, distilled() if "DeiT" in architecture else vit()


@pytest.mark.parametrize(
    "architecture", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"]
)
@pytest.mark.parametrize("saved", ["state_dict", "save_pretrained"])
@torch.no_grad()
def test_hf_models_give_the_same_logits(tmp_path: Path, architecture: str, saved: str) -> None:
    source, model = hf_pair(architecture)
    if saved == "save_pretrained":
        source.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
    else:
        file = save(source.state_dict(), tmp_path / "model.bin")
    load_checkpoint(model, file)
    torch.testing.assert_close(model(images()), source(images()).logits, rtol=1e-5, atol=1e-5)


def test_hf_model_loads_its_own_state_dict(tmp_path: Path) -> None:
    source, _ = hf_pair("ViTForImageClassification")
    other, _ = hf_pair("ViTForImageClassification")
    nn.init.zeros_(other.classifier.weight)
    assert load_checkpoint(other, save(source.state_dict(), tmp_path / "w.bin")).layout == "native"
    assert_unchanged(other, source.state_dict())


# --- position embeddings --------------------------------------------------------------------------


@pytest.mark.parametrize("build", [vit, distilled])
@pytest.mark.parametrize("new", [(48, 48), (16, 40)])
def test_position_embeddings_are_resized(
    tmp_path: Path, build: Callable[..., VisionTransformer], new: tuple[int, int]
) -> None:
    source, model = build(), build(seed=1, img_size=new)
    report = load_checkpoint(model, save(source.state_dict(), tmp_path / "w.safetensors"))
    grid = (new[0] // 8, new[1] // 8)
    assert report.pos_embed_resized == ((4, 4), grid)
    assert (
        report.summary()
        == f"w.safetensors: timm layout; position embeddings resized 4x4 -> {grid[0]}x{grid[1]}"
    )
    prefix = source.num_prefix_tokens
    patches = source.pos_embed[:, prefix:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(patches, size=grid, mode="bicubic", antialias=True)
    torch.testing.assert_close(
        model.pos_embed[:, prefix:], expected.flatten(2).transpose(1, 2), rtol=0, atol=0
    )
    assert torch.equal(model.pos_embed[:, :prefix], source.pos_embed[:, :prefix])


def test_position_embeddings_without_a_class_position(tmp_path: Path) -> None:
    source, model = vit(no_embed_class=True), vit(seed=1, no_embed_class=True, img_size=64)
    report = load_checkpoint(model, save(source.state_dict(), tmp_path / "w.pth"))
    assert report.pos_embed_resized == ((4, 4), (8, 8))


def test_a_wide_grid_keeps_its_aspect_ratio(tmp_path: Path) -> None:
    source, model = vit(img_size=(16, 48)), vit(seed=1, img_size=(32, 96))
    report = load_checkpoint(model, save(source.state_dict(), tmp_path / "w.pth"))
    assert report.pos_embed_resized == ((2, 6), (4, 12))
    patches = source.pos_embed[:, 1:].unflatten(1, (2, 6)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(patches, size=(4, 12), mode="bicubic", antialias=True)
    assert torch.equal(model.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))


def test_as_many_positions_mean_the_same_grid(tmp_path: Path) -> None:
    source, model = vit(img_size=(16, 64)), vit(seed=1, img_size=(16, 64))
    report = load_checkpoint(model, save(source.state_dict(), tmp_path / "w.pth"))
    assert report.pos_embed_resized is None
    assert_same_output(source, model, (16, 64))


@pytest.mark.parametrize("layout", ["seed", "hf", "google"])
def test_foreign_layouts_are_resized_like_timms(tmp_path: Path, layout: str) -> None:
    state = vit().state_dict()
    expected, model = vit(seed=1, img_size=(24, 48)), vit(seed=2, img_size=(24, 48))
    load_checkpoint(expected, save(state, tmp_path / "w.pth"))
    if layout == "google":
        file = write_npz(tmp_path / "w.npz", google_layout(state))
    else:
        file = save(seed_layout(state) if layout == "seed" else hf_vit(state, HF4), tmp_path / "foreign.pth")
    assert load_checkpoint(model, file).pos_embed_resized == ((4, 4), (3, 6))
    assert_unchanged(model, expected.state_dict())


def test_positions_that_are_no_grid(tmp_path: Path) -> None:
    file = save(vit(img_size=(24, 40)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError,
        match=r"16 position embeddings .* after 1 prefix tokens, .* shaped like the model's 4x4",
    ):
        load_checkpoint(vit(), file)


# --- heads ----------------------------------------------------------------------------------------


def test_another_head_is_an_error(tmp_path: Path) -> None:
    model = vit(seed=1, num_classes=5)
    before, file = copied(model), save(vit().state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError,
        match=r"w\.pth: has a head of 7 classes, expected a head of 5 classes; create the model with "
        r"num_classes=7, or pass replace_head=True to keep the head",
    ):
        load_checkpoint(model, file)
    assert_unchanged(model, before)


@pytest.mark.parametrize("layout", ["timm", "seed", "hf", "google"])
def test_replace_head_keeps_the_models_head(tmp_path: Path, layout: str) -> None:
    source, model = vit(), vit(seed=1, num_classes=5)
    state, head = source.state_dict(), copied(model.head)
    writers: Names = {"timm": dict, "seed": seed_layout, "hf": lambda state: hf_vit(state, HF5)}
    if layout == "google":
        file = write_npz(tmp_path / "w.npz", google_layout(state))
    else:
        file = save(writers[layout](state), tmp_path / "w.pth")
    report = load_checkpoint(model, file, replace_head=True)
    assert report.head_replaced == (7, 5)
    assert report.summary().endswith("; head not loaded (file 7 classes, model 5)")
    assert_unchanged(model.head, head)
    assert torch.equal(model.forward_features(images()), source.forward_features(images()))


def test_replace_head_of_a_distilled_model(tmp_path: Path) -> None:
    source, model = distilled(), distilled(seed=1, num_classes=5)
    head = copied(model.head_dist)
    assert load_checkpoint(
        model, save(source.state_dict(), tmp_path / "w.pth"), replace_head=True
    ).head_replaced == (7, 5)
    assert_unchanged(model.head_dist, head)


def test_replace_head_loads_a_head_that_fits(tmp_path: Path) -> None:
    source, model = vit(), vit(seed=1)
    report = load_checkpoint(model, save(source.state_dict(), tmp_path / "w.pth"), replace_head=True)
    assert report.head_replaced is None
    assert_same_output(source, model)


def test_a_file_without_head(tmp_path: Path) -> None:
    file = save(vit(num_classes=0).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"has no head, expected a head of 7 classes; .*num_classes=0"):
        load_checkpoint(vit(), file)
    assert load_checkpoint(vit(), file, replace_head=True).head_replaced == (0, 7)


def test_a_model_without_head(tmp_path: Path) -> None:
    file = save(vit().state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="has a head of 7 classes, expected no head"):
        load_checkpoint(vit(num_classes=0), file)
    assert load_checkpoint(vit(num_classes=0), file, replace_head=True).head_replaced == (7, 0)


def test_hf_distilled_backbone_with_one_head(tmp_path: Path) -> None:
    state = hf_deit(distilled().state_dict(), HF4)
    state = {
        key.replace("cls_c", "c"): tensor for key, tensor in state.items() if "distillation_c" not in key
    }
    file = save(state, tmp_path / "w.bin")
    with pytest.raises(
        CheckpointError,
        match=r"its head is head\.bias 7, head\.weight 7x24, expected .*head_dist\.weight 7x24; pass",
    ):
        load_checkpoint(distilled(), file)
    assert load_checkpoint(distilled(), file, replace_head=True).head_replaced == (7, 7)


@pytest.mark.parametrize("layout", ["timm", "google"])
def test_a_head_behind_pre_logits_is_not_taken(tmp_path: Path, layout: str) -> None:
    state = vit().state_dict()
    if layout == "google":
        file = write_npz(
            tmp_path / "w.npz", {**google_layout(state), "pre_logits/kernel": np.zeros((WIDTH, WIDTH), "f4")}
        )
    else:
        file = save({**state, "pre_logits.fc.weight": torch.zeros(WIDTH, WIDTH)}, tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match="its head reads a pre_logits layer, which the model lacks; pass replace"
    ):
        load_checkpoint(vit(seed=1), file)
    report = load_checkpoint(vit(seed=1), file, replace_head=True)
    assert report.head_replaced == (7, 7)
    assert len(report.ignored) == 1
    assert "ignored pre_logits" in report.summary()


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_cast_to_the_models_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source, model = vit(), vit(seed=1)
    state = {key: tensor.to(dtype) for key, tensor in source.state_dict().items()}
    load_checkpoint(model, save(state, tmp_path / "w.safetensors"))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert_same_output(source.to(dtype).float(), model)


def test_half_precision_positions_are_resized_in_float32(tmp_path: Path) -> None:
    state = {key: tensor.half() for key, tensor in vit().state_dict().items()}
    full = {key: tensor.float() for key, tensor in state.items()}
    models = [vit(img_size=48), vit(img_size=48)]
    for model, content in zip(models, (state, full), strict=True):
        load_checkpoint(model, save(content, tmp_path / "w.pth"))
    assert torch.equal(models[0].pos_embed, models[1].pos_embed)


def test_integers_are_not_cast_to_weights(tmp_path: Path) -> None:
    state = {**vit().state_dict(), "norm.weight": torch.ones(WIDTH, dtype=torch.int8)}
    with pytest.raises(
        CheckpointError, match=r"norm\.weight is torch\.int8, expected torch\.float32; convert"
    ):
        load_checkpoint(vit(), save(state, tmp_path / "w.pth"))


# --- files that do not fit ------------------------------------------------------------------------


def refused(tmp_path: Path, state: object, model: nn.Module, match: str, name: str = "w.pth") -> None:
    before, file = copied(model), save(state, tmp_path / name)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(model, file, replace_head=True)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


def test_other_patch_size(tmp_path: Path) -> None:
    refused(
        tmp_path,
        vit(patch_size=4, img_size=16).state_dict(),
        vit(),
        r"shapes differ: patch_embed\.proj\.weight is 24x3x4x4, expected 24x3x8x8; "
        r"the file has 2 blocks, width 24, patch 4x4, the model 2 blocks, width 24, patch 8x8; create",
    )


def test_other_width(tmp_path: Path) -> None:
    refused(
        tmp_path,
        vit(embed_dim=30).state_dict(),
        vit(),
        r"cls_token is 1x1x30, expected 1x1x24, .* and \d+ more; the",
    )


def test_other_depth(tmp_path: Path) -> None:
    match = (
        r"does not fit VisionTransformer: missing 12 \(blocks\.2\.norm1\.weight, .* 9 more\); the file has 2"
    )
    refused(tmp_path, vit().state_dict(), vit(depth=3), match)
    refused(
        tmp_path, seed_layout(vit().state_dict()), vit(depth=1), r"unexpected 12 \(blocks\.1\.norm1\.weight, "
    )


def test_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    state = vit().state_dict()
    state["nrom.weight"] = state.pop("norm.weight")
    refused(tmp_path, state, vit(), r"missing 1 \(norm\.weight\); unexpected 1 \(nrom\.weight\)")


def test_tensors_that_no_layout_expects_are_refused(tmp_path: Path) -> None:
    """Converting must not drop what it does not know."""
    extra = {"adapter.weight": torch.zeros(2)}
    clip, dinov2 = vit(pre_norm=True), vit(num_classes=0)
    states: list[tuple[State, nn.Module]] = [
        (clip_layout(clip.state_dict()), clip),
        ({**dinov2.state_dict(), "mask_token": torch.zeros(1, WIDTH)}, dinov2),
        ({**dinov2.state_dict(), "decoder_embed.weight": torch.zeros(5, WIDTH)}, dinov2),
        (hf_vit(vit().state_dict(), HF4), vit()),
        (seed_layout(vit().state_dict()), vit()),
    ]
    for state, model in states:
        refused(tmp_path, {**state, **extra}, model, r"VisionTransformer: unexpected 1 \(adapter\.weight\)")


def test_a_lone_query_is_reported(tmp_path: Path) -> None:
    state = hf_vit(vit().state_dict(), HF4)
    del state["vit.encoder.layer.1.attention.attention.key.bias"]
    refused(
        tmp_path,
        state,
        vit(),
        r"missing 1 \(blocks\.1\.attn\.qkv\.bias\); unexpected 2 \(blocks\.1\.attn\.q\.bias, ",
    )


def test_distilled_and_plain_do_not_mix(tmp_path: Path) -> None:
    refused(tmp_path, distilled().state_dict(), vit(), "create one whose name has 'distilled'")
    refused(tmp_path, vit().state_dict(), distilled(), "create the model without 'distilled' in its name")


def test_two_names_for_one_tensor(tmp_path: Path) -> None:
    state = hf_vit(vit().state_dict(), HF4)
    state["cls_classifier.weight"] = state["classifier.weight"]
    refused(
        tmp_path, state, vit(), r"has two tensors for head\.weight; cls_classifier\.weight is one of them"
    )


def test_unknown_layout(tmp_path: Path) -> None:
    refused(
        tmp_path, {"a.b": torch.zeros(1)}, vit(), r"no known layout \(a\.b\); known are seed, google-npz, hf"
    )


def test_misshapen_layout(tmp_path: Path) -> None:
    arrays = {**google_layout(vit().state_dict()), "embedding/kernel": np.zeros(3, "f4")}
    file = write_npz(tmp_path / "w.npz", arrays)
    with pytest.raises(
        CheckpointError, match="looks like the google-npz layout, but its tensors do not fit it"
    ):
        load_checkpoint(vit(), file)


def test_foreign_layout_for_another_model(tmp_path: Path) -> None:
    state = seed_layout(vit().state_dict())
    refused(
        tmp_path, state, nn.Linear(3, 5), r"does not fit Linear: .* foreign ones load only into a timm Vision"
    )


def test_wrong_shapes_without_patches(tmp_path: Path) -> None:
    refused(
        tmp_path,
        nn.Linear(3, 4).state_dict(),
        nn.Linear(3, 5),
        r"shapes differ: weight is 4x3, expected 5x3, bias is .*5; create",
    )
    refused(
        tmp_path,
        {"weight": torch.tensor(1.0)},
        nn.Linear(3, 5, bias=False),
        "weight is a scalar, expected 5x3",
    )


def test_model_on_the_meta_device(tmp_path: Path) -> None:
    file = save(vit().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"parameters on the meta device; call model\.to_empty"):
        load_checkpoint(nn.Linear(2, 3, device="meta"), file)


# --- files that cannot be read --------------------------------------------------------------------


class Malicious:
    """Runs code when unpickled: creates the file it was given."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def unreadable(file: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(vit(), file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("entry", ["model", "extra"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, form: str, entry: str) -> None:
    target, file = tmp_path / "created", tmp_path / "evil.pth"
    content = {"state_dict": vit().state_dict(), entry: Malicious(target)}
    torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    unreadable(
        file,
        r"needs arbitrary unpickling \(it contains \w+\.mkdir\), which can run code, and was not read; save",
    )
    assert not target.exists()


@pytest.mark.parametrize(
    ("protocol", "reason"), [(2, r"it contains \w+\.mkdir"), (4, "nothing in it was run")]
)
def test_code_in_a_plain_pickle_is_not_run(tmp_path: Path, protocol: int, reason: str) -> None:
    file = tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps(Malicious(tmp_path / "created"), protocol=protocol))
    unreadable(file, reason)
    assert not (tmp_path / "created").exists()


def test_a_whole_pickled_model_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(vit(), tmp_path / "w.pth")
    unreadable(tmp_path / "w.pth", r"it contains timm\.models\.vision_transformer\.VisionTransformer\)")


def test_objects_in_an_npz_are_refused_and_not_run(tmp_path: Path) -> None:
    array = np.empty(1, dtype=object)
    array[0] = Malicious(tmp_path / "created")
    unreadable(write_npz(tmp_path / "evil.npz", {"embedding/kernel": array}), "allow_pickle=False")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("listed", [None, ["w/data.pkl"]])
def test_torchscript_is_refused_before_torch_loads_it(
    listed: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's reader and torch's can be shown different lists in the same bytes: torch's own decides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; old files are not gone
        torch.jit.save(torch.jit.script(nn.Linear(2, 3)), tmp_path / "w.pt")
    if listed is not None:
        monkeypatch.setattr(zipfile.ZipFile, "namelist", lambda _: listed)
    monkeypatch.setattr(torch, "load", None)
    unreadable(tmp_path / "w.pt", "is a TorchScript program, which holds code; save its state_dict")


def test_a_tar_that_begins_like_a_pickle_is_refused_before_torch_unpacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How torch saved in its first versions: torch 2.5 unpacks it, with whatever its members are called."""
    with tarfile.open(tmp_path / "w.pth", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        for name in ("\x80", "storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    assert (tmp_path / "w.pth").read_bytes()[:1] == b"\x80"
    monkeypatch.setattr(torch, "load", None)
    unreadable(tmp_path / "w.pth", "is a tar archive, which torch would unpack .*; save its state_dict")


def test_missing_file(tmp_path: Path) -> None:
    unreadable(tmp_path / "none.pth", "no such file")


def test_folder(tmp_path: Path) -> None:
    unreadable(tmp_path, r"is a folder; give the weights file in it \(it has none\)")
    (tmp_path / "model.safetensors").touch()
    unreadable(tmp_path, r"is a folder; give the weights file in it \(model\.safetensors\)")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save({"w": torch.zeros(1)}, tmp_path / "w.pth")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    unreadable(file, r"cannot be read \(Permission denied\)")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    unreadable(tmp_path / "w.safetensors", "the file is empty; download it again")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "legacy.pth", "w.npz"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, name: str, part: float) -> None:
    file, state = tmp_path / name, vit().state_dict()
    if name == "w.npz":
        write_npz(file, google_layout(state))
    elif name == "legacy.pth":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    else:
        save(state, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    unreadable(file, r"is truncated(,| or) damaged.*download it again")


def test_damaged_pickles(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"\x80\x02hello")
    unreadable(tmp_path / "w.pth", r"is truncated, damaged or not supported \(\w+\); download it again")
    (tmp_path / "w.pth").write_bytes(b"\x80\x02\x95")
    unreadable(
        tmp_path / "w.pth",
        r"is damaged, or not written by torch\.save \(Unsupported operand 149\)",
    )


def test_safetensors_whose_header_length_looks_like_a_pickle(tmp_path: Path) -> None:
    header = b'{"weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'.ljust(0x80)
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    model = nn.Linear(1, 1, bias=False)
    load_checkpoint(model, tmp_path / "w.safetensors")
    assert model.weight.item() == 0


def test_damaged_npz_member(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("cls.npy", b"not an array")
    unreadable(tmp_path / "w.npz", "is truncated, damaged or not supported")


def test_a_long_complaint_of_a_library_is_cut_and_does_not_take_long(tmp_path: Path) -> None:
    """A zip that names one file in its directory and 60,000 letters at its place is quoted whole by zipfile."""
    long = "x" * 60_000
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr(f"{long}.npy", b"")
    content = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "w.npz").write_bytes(content.replace(b"xxx", b"yxx", 1))
    start = time.monotonic()
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(nn.Linear(1, 1), tmp_path / "w.npz")
    assert time.monotonic() - start < 5
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


def test_not_a_weights_file(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("<!DOCTYPE html><html>404</html>")
    unreadable(
        tmp_path / "w.pth", r"is not a weights file \(it starts with b'<!DOCTYPE ht'\); expected safetensors"
    )
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    unreadable(tmp_path / "lfs.pth", "is a Git LFS pointer, not the weights; run `git lfs pull`")


def test_zip_without_weights(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    unreadable(tmp_path / "w.npz", r"is a zip archive without weights \(it holds readme\.txt\)")


def test_zip_whose_names_are_no_text(tmp_path: Path) -> None:
    """Found by mutation: zipfile raises a UnicodeDecodeError, which names neither the file nor what to do."""
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("weights-\u00e9.npy", b"")
    content = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "w.npz").write_bytes(content.replace("\u00e9".encode(), b"\xff\xff"))
    unreadable(
        tmp_path / "w.npz", r"is truncated or damaged \('utf-8' codec can't decode .*\); download it again"
    )


def test_unknown_extension(tmp_path: Path) -> None:
    save({"w": torch.zeros(1)}, tmp_path / "w.h5")
    unreadable(tmp_path / "w.h5", r"unknown extension '\.h5'; expected one of \.safetensors, \.pth")


def test_extension_that_contradicts_the_content(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    unreadable(
        tmp_path / "w.safetensors",
        r"extension says safetensors but the content is torch; rename it to \*\.pth",
    )
    save({"w": torch.zeros(1)}, tmp_path / "w.npz.safetensors").rename(tmp_path / "w.npz")
    unreadable(
        tmp_path / "w.npz", r"extension says npz but the content is safetensors; rename it to \*\.safetens"
    )


def test_content_that_is_no_state_dict(tmp_path: Path) -> None:
    unreadable(save([torch.zeros(1)], tmp_path / "a.pth"), "holds a list; expected a dict of tensors")
    unreadable(save({}, tmp_path / "b.pth"), "holds no tensors")
    content = {"net": vit().state_dict(), "epoch": 3}
    unreadable(
        save(content, tmp_path / "c.pth"),
        r"holds no state_dict but net \(\w+\), epoch \(int\); .* entry state_dict_ema or",
    )


# --- real weights ---------------------------------------------------------------------------------


def test_deit_tiny_weights_load_strictly() -> None:
    file = shared_path("weights/deit_tiny_patch16_224.safetensors")
    model = timm.create_model("deit_tiny_patch16_224")
    report = load_checkpoint(model, file)
    assert report == CheckpointReport(file, "timm")
    assert report.summary() == "deit_tiny_patch16_224.safetensors: timm layout"


@pytest.mark.parametrize("name", ["head.bias", "module.head.bias", "classifier.bias", "heads.head.bias"])
def test_the_classes_of_a_file_are_those_of_its_head(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({name: torch.zeros(7), "blocks.0.mlp.fc1.bias": torch.zeros(3)}, path)
    assert head_classes(path) == 7


def test_a_file_without_a_head_has_no_classes(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"norm.bias": torch.zeros(7)}, path)
    assert head_classes(path) is None


def test_a_file_that_cannot_be_read_is_named_when_its_classes_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.pth: no such file"):
        head_classes(tmp_path / "absent.pth")
