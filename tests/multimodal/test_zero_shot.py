"""Classes known by their names: the text towers of open_clip and transformers, dense against pruned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cpvit
from cpvit.adapters import Host, UnsupportedModelError
from cpvit.commands.cli import main
from cpvit.measure.support import randomize_
from cpvit.multimodal.two_towers import class_features, open_two_towers, read_lines, zero_shot_classifier
from cpvit.pruning.prune import prune_host

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

# open_clip opens its vocabulary without closing it.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

NAMES = ["a dog", "a cat", "a red bus"]
TOWER = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "projection_size": 24,
}


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[str]:
    """The name of an architecture that open_clip is told of."""
    config = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 24, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (tmp_path / "tiny-towers.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-towers.json")
    yield "tiny-towers"
    del open_clip.factory._MODEL_CONFIGS["tiny-towers"]


@pytest.fixture
def weights(tiny: str, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = open_clip.create_model(tiny)
    randomize_(model.visual)
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


def words() -> Any:
    vocabulary = [
        "[UNK]",
        "<s>",
        "</s>",
        "<pad>",
        *["a", "dog", "cat", "red", "bus", "photo", "of", "the", ".", "drawing"],
    ]
    inner = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(params=["CLIP", "Siglip"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A two-tower model of transformers with its tokenizer and image processor."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(vision_config=TOWER, text_config=TEXT)
    model = getattr(transformers, f"{request.param}Model")(config).eval()
    randomize_(model)
    model.logit_scale.data.fill_(1.5)
    found = tmp_path / "towers"
    model.save_pretrained(found)
    words().save_pretrained(found)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(found)
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for label in ("bus", "cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "data" / label / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n\n")
    return tmp_path / "classes.txt"


@torch.no_grad()
def answers(host: Host, images: torch.Tensor) -> torch.Tensor:
    return host.output(host.model(images))


def test_logits_are_those_of_the_model_of_transformers(folder: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    host = zero_shot_classifier(open_two_towers(f"hf:{folder}"), NAMES, ["{}"])
    model = transformers.AutoModel.from_pretrained(folder).eval()
    given = words()(NAMES, padding="max_length", max_length=16, return_tensors="pt")
    extra = {} if "Siglip" in type(model).__name__ else {"attention_mask": given["attention_mask"]}
    with torch.no_grad():
        expected = model(input_ids=given["input_ids"], pixel_values=images, **extra).logits_per_image
    bias = getattr(model, "logit_bias", torch.zeros(1))
    got = answers(host, images)
    assert float(got.std()) > 1e-3
    torch.testing.assert_close(got, expected - bias, rtol=1e-4, atol=1e-4)


def test_templates_are_averaged_as_open_clip_does(tiny: str, weights: Path) -> None:
    templates = ["a photo of {}.", "a drawing of {}"]
    towers = open_two_towers(f"open_clip:{tiny}", checkpoint=weights)
    model = open_clip.create_model(tiny, pretrained=str(weights)).eval()
    expected = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(tiny), NAMES, templates)
    torch.testing.assert_close(class_features(towers, NAMES, templates), expected.T)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.encode_image(images, normalize=True)
        logits = model.logit_scale.exp() * features @ expected
    torch.testing.assert_close(answers(zero_shot_classifier(towers, NAMES, templates), images), logits)


def test_keeping_everything_gives_the_same_logits(folder: Path) -> None:
    host, images = zero_shot_classifier(open_two_towers(str(folder)), NAMES), torch.randn(2, 3, 32, 32)
    expected = answers(host, images)
    prune_host(host, cpvit.PruneConfig(keep_rate=1.0))
    torch.testing.assert_close(answers(host, images), expected, rtol=1e-5, atol=1e-5)
    prune_host(host, cpvit.PruneConfig(keep_rate=0.3))
    assert not torch.allclose(answers(host, images), expected, rtol=1e-3, atol=1e-3)


def test_a_tower_in_half_precision_is_checked_too(folder: Path) -> None:
    host = zero_shot_classifier(open_two_towers(str(folder)), NAMES)
    host.model.to(torch.bfloat16)
    prune_host(host, cpvit.PruneConfig(keep_rate=0.5))
    assert answers(host, torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).shape == (1, 3)


def record_of(tmp_path: Path, *arguments: str) -> Any:
    assert main(["eval", *arguments, "--json", str(tmp_path / "record.json")]) == 0
    return json.loads((tmp_path / "record.json").read_text())


def test_eval_of_a_folder(folder: Path, data: Path, classes: Path, tmp_path: Path, capsys: Any) -> None:
    common = ("--model", str(folder), "--data", str(data), "--zero-shot", str(classes))
    found = record_of(tmp_path, *common, "--method", "cpvit-merge", "--macs", "0.7")
    assert "zero-shot, 3 classes in 7 templates" in capsys.readouterr().out
    assert found["images"] == 9
    assert found["macs_ratio"] == pytest.approx(0.7, abs=0.02)
    whole = record_of(tmp_path, *common, "--keep-rate", "1.0")
    assert (whole["agreement"], whole["kl"]) == (1.0, pytest.approx(0, abs=1e-6))
    host = zero_shot_classifier(open_two_towers(str(folder)), NAMES)
    assert whole["dense"]["params"] == sum(p.numel() for p in host.model.parameters())


def test_eval_of_open_clip_with_templates(
    tiny: str, weights: Path, data: Path, classes: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "templates.txt").write_text("a photo of {}.\n")
    found = record_of(
        tmp_path,
        *("--model", f"open_clip:{tiny}", "--checkpoint", str(weights), "--data", str(data)),
        *("--zero-shot", str(classes), "--templates", str(tmp_path / "templates.txt"), "--macs", "0.7"),
    )
    assert "3 classes in 1 templates" in capsys.readouterr().out
    assert found["images"] == 9


def test_what_is_missing_is_said(
    folder: Path, tiny: str, data: Path, classes: Path, tmp_path: Path, capsys: Any
) -> None:
    def complaint(*arguments: str) -> str:
        assert main(["eval", "--data", str(data), *arguments]) != 0
        return str(capsys.readouterr().err)

    said = ("--zero-shot", str(classes))
    assert "random weights know no words" in complaint("--model", f"open_clip:{tiny}", *said)
    assert "has no text tower that cpvit knows" in complaint("--model", "deit_tiny_patch16_224", *said)
    assert "--templates is for --zero-shot" in complaint("--model", str(folder), "--templates", str(classes))
    assert "is not there; give a text file" in complaint(
        "--model", str(folder), "--zero-shot", str(tmp_path / "no.txt")
    )
    assert "a template holds {} where the class name goes, got ['a dog'" in complaint(
        "--model", str(folder), *said, "--templates", str(classes)
    )
    assert "brings its weights; leave out --checkpoint" in complaint(
        "--model", str(folder), *said, "--checkpoint", str(classes)
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    # transformers makes up an empty tokenizer for some models, and raises for others.
    said_of_words = complaint("--model", str(folder), *said)
    assert "knows none of their words" in said_of_words or "holds no tokenizer" in said_of_words


def test_class_names_are_checked(folder: Path) -> None:
    towers = open_two_towers(str(folder))
    with pytest.raises(ValueError, match=r"each once, got 2 \(1 different\)"):
        class_features(towers, ["a dog", "a dog"])
    with pytest.raises(FileNotFoundError, match="a class name, or template, per line"):
        read_lines(folder)


def test_a_classifier_has_no_text_tower(tmp_path: Path) -> None:
    transformers.ViTForImageClassification(transformers.ViTConfig(**TOWER)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"ViTForImageClassification .* has no text tower"):
        open_two_towers(str(tmp_path))
