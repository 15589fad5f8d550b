"""``--report`` of the commands that run images: a page of the run, at once."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import timm
from conftest import add_member, randomize_
from PIL import Image
from safetensors.torch import save_file

from cpvit.commands.cli import main

pytest.importorskip("vl_convert")
pytest.importorskip("jinja2")

MODEL = ["--model", "test_vit", "--image-size", "64", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of two classes in a tar."""
    path = tmp_path_factory.mktemp("data") / "animals.tar"
    with tarfile.open(path, "w") as archive:
        for split, count in (("train", 3), ("val", 2)):
            for shade, name in enumerate(("ant", "bee")):
                for number in range(count):
                    file = io.BytesIO()
                    Image.new("RGB", (64, 64), (90 * shade, 40 * number, 99)).save(file, "PNG")
                    add_member(archive, f"{split}/{name}/{number}.png", file.getvalue())
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = timm.create_model("test_vit", num_classes=2, img_size=64)
    randomize_(model, 0)
    path = tmp_path_factory.mktemp("weights") / "two.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("verb", "more", "sections"),
    [
        ("eval", ["--macs", "0.7"], {"accuracy", "plan", "gallery"}),
        ("sweep", ["--macs", "0.8,0.6"], {"accuracy", "plan"}),
        ("finetune", ["--macs", "0.7", "--num-steps", "2", "--batch-size", "2"], {"training", "plan"}),
    ],
)
def test_the_page_of_a_run(
    verb: str, more: list[str], sections: set[str], data: Path, weights: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    asked = [verb, *MODEL, "--checkpoint", str(weights), "--data", str(data), *more, "--report", str(page)]
    if verb == "finetune":
        asked += ["--output-dir", str(tmp_path / "run")]
    assert main(asked) == 0
    text = page.read_text()
    assert f"cpvit {verb} --model test_vit" in text, "the command that made it"
    assert sections <= {name for name in sections if f'<section id="{name}">' in text}
