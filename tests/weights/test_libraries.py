"""Models of other libraries by name, and from folders: weights, preprocessing, classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cpvit
from cpvit.adapters import open_host
from cpvit.commands.cli import main
from cpvit.data import Preprocessing
from cpvit.weights.create import create_model

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
VIT = {**SMALL, "image_size": 32, "patch_size": 8, "num_labels": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier as ``save_pretrained`` leaves it, with its image processor."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).eval()
    model.save_pretrained(tmp_path / "vit")
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3
    )
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for label in ("a", "b", "c"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(2):
            pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "data" / label / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_folder_of_transformers_brings_weights_and_preprocessing(folder: Path, prefix: str) -> None:
    model: Any = create_model(f"{prefix}{folder}")
    saved = transformers.ViTForImageClassification.from_pretrained(folder)
    assert torch.equal(model.classifier.weight, saved.classifier.weight)
    assert not model.training
    assert open_host(model).num_classes == 3
    found = Preprocessing.from_model(model)
    assert found == Preprocessing((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 1.0, "squash")


def test_a_crop_of_a_processor_is_a_crop(folder: Path) -> None:
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, resample=2
    ).save_pretrained(folder)
    found = Preprocessing.from_model(create_model(str(folder)))
    assert (found.image_size, found.crop_pct, found.crop_mode, found.interpolation) == (
        (32, 32),
        0.8,
        "center",
        "bilinear",
    )


def test_without_a_processor_mean_and_std_are_needed(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    model = create_model(str(folder))
    with pytest.raises(
        ValueError, match=r"its preprocessing is unknown; .*give image_size, mean and std \(--mean"
    ):
        Preprocessing.from_model(model)
    found = Preprocessing.from_model(model, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert (found.image_size, found.mean, found.crop_pct) == ((32, 32), (0.5,) * 3, 0.875)


@pytest.mark.parametrize("name", ["torchvision:vit_b_32", "torchvision/vit_b_32"])
def test_torchvision_is_preprocessed_as_its_weights_say(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=5)
    assert open_host(model).num_classes == 5
    found = Preprocessing.from_model(model)
    assert (found.image_size, found.mean[0], found.crop_pct) == ((224, 224), 0.485, 224 / 256)
    assert found.interpolation == "bilinear"


def test_open_clip_by_name() -> None:
    pytest.importorskip("open_clip")
    model = create_model("open_clip:ViT-S-32")
    assert open_host(model).family == "open_clip ViT"
    assert Preprocessing.from_model(model).mean[0] == pytest.approx(0.48145466)
    with pytest.raises(ValueError, match=r"unknown model 'ViT-Z'; open_clip has .*ViT-B-32"):
        create_model("open_clip:ViT-Z")
    with pytest.raises(ValueError, match=r"name the weights, as in open_clip:ViT-B-32:TAG; .*openai"):
        create_model("open_clip:ViT-B-32", pretrained=True)


def test_what_a_folder_cannot_take_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="has the head it has, got num_classes=5"):
        create_model(str(folder), num_classes=5)
    with pytest.raises(ValueError, match="has a size of its own"):
        create_model(str(folder), image_size=64)
    with pytest.raises(ValueError, match="has no stochastic depth"):
        create_model(str(folder), drop_path=0.1)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_a_folder_is_evaluated_and_verified(folder: Path, data: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert (
        run("eval", "--model", folder, "--data", data, "--macs", 0.8, "--device", "cpu", "--json", record)
        == 0
    )
    result = json.loads(record.read_text())
    assert result["images"] == 6
    assert result["macs_ratio"] == pytest.approx(0.8, abs=0.03)
    assert run("verify", "--model", f"hf:{folder}", "--device", "cpu") == 0


def test_mean_and_std_by_hand_are_enough(
    folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "preprocessor_config.json").unlink()
    command = ("eval", "--model", folder, "--data", data, "--device", "cpu")
    assert run(*command) != 0
    assert "its preprocessing is unknown" in capsys.readouterr().err
    assert run(*command, "--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5) == 0


def test_weights_are_not_given_twice(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", "--model", folder, "--data", data, "--pretrained") != 0
    assert "brings its weights; leave out --checkpoint and --pretrained" in capsys.readouterr().err


def test_a_saved_pruned_model_with_cut_heads_is_evaluated_as_it_is(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model(str(folder))
    config = cpvit.PruneConfig(keep_rate=0.5, head_keep_rate=0.4)
    plan = cpvit.prune_(model, config, calibration=torch.randn(4, 3, 32, 32))
    assert min(plan.heads_per_block) == 1
    cpvit.save_pruned(model, tmp_path / "pruned")
    record = tmp_path / "record.json"
    run("eval", "--model", tmp_path / "pruned", "--data", data, "--device", "cpu", "--json", record)
    result = json.loads(record.read_text())
    assert result["pruned"]["heads_per_block"] == list(plan.heads_per_block)
    assert result["images"] == 6
    assert "pruned" in capsys.readouterr().out
    again = create_model(str(tmp_path / "pruned"))
    assert Preprocessing.from_model(again) == Preprocessing.from_model(model)
    assert run("eval", "--model", tmp_path / "pruned", "--data", data, "--macs", 0.7) != 0
    assert "holds a pruned model and its plan; leave out --plan" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["open_clip:tiny-eye", "towers"])
def test_a_pruned_model_of_open_clip_is_built_again_by_its_name(name: str, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 24, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 99, "width": 16, "heads": 2, "layers": 2},
    }
    (tmp_path / "tiny-eye.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-eye.json")
    whole = name == "towers"
    model = open_clip.create_model("tiny-eye").eval() if whole else create_model(name)
    arguments = {"architecture": "tiny-eye"} if whole else None
    plan = cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=(12, 8, 5)))
    if whole:
        described = json.loads((cpvit.save_pruned(model, tmp_path / "b") / "model.json").read_text())
        assert 'arguments={"architecture": "ViT-B-32"}' in described["no_recipe"]
    again = cpvit.load_pruned(cpvit.save_pruned(model, tmp_path / "a", arguments=arguments))
    host, images = open_host(model), torch.randn(2, 3, 32, 32)
    assert cpvit.plan_of(again) == plan
    with torch.no_grad():
        assert torch.equal(open_host(again).output(again(images)), host.output(model(images)))
    if not whole:
        assert Preprocessing.from_model(again) == Preprocessing.from_model(model)
    del open_clip.factory._MODEL_CONFIGS["tiny-eye"]
