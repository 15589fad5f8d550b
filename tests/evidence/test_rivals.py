"""The study that runs other projects' code: how it is found, read and compared, on a made-up project."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from evidence.catalog import ROOT

CODE = """
from other.helpers import cut
from timm.models.vision_transformer import Block

class Cutting(Block):
    def forward(self, x):
        return cut(super().forward(x), self.info["r"])

def apply_patch(model):
    model.info = {"r": 0}
    for module in model.modules():
        if isinstance(module, Block):
            module.__class__ = Cutting
            module.info = model.info
"""


@pytest.fixture(scope="module")
def rivals() -> Any:
    spec = importlib.util.spec_from_file_location("rivals", ROOT / "studies" / "rivals.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rivals"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose ``__init__`` does not import any more, and whose inner modules do."""
    package = tmp_path / "other"
    (package / "patch").mkdir(parents=True)
    (package / "__init__.py").write_text("import what_is_long_gone")
    (package / "helpers.py").write_text("def cut(x, r):\n    return x[:, : x.shape[1] - r]\n")
    (package / "patch" / "timm.py").write_text(CODE)
    for name in ("other", "other.patch", "other.patch.timm", "other.helpers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_their_code_runs_from_its_folder_and_its_tokens_are_counted(rivals: Any, project: Path) -> None:
    rival = rivals.Rival("Other", "tome", "other.patch.timm", "r", (3,), "tome", 0)
    model = timm.create_model("test_vit").eval()
    images = torch.rand(2, 3, *model.patch_embed.img_size)
    expected = rivals.logits_of(model, images)
    patched = rivals.patch_of(rival, project)(model)
    assert torch.equal(rivals.logits_of(patched, images), expected)
    patched.info["r"] = 3
    whole = model.patch_embed.num_patches + 1
    with rivals.counted(patched) as tokens:
        cut = rivals.logits_of(patched, images)
        rivals.logits_of(patched, images)
    assert tokens == [whole - 3 * (block + 1) for block in range(len(model.blocks))]
    assert not torch.equal(cut, expected)


def test_a_folder_without_the_project_is_named(rivals: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--pitome .*: there is no .*deit\.py; clone the project"):
        rivals.patch_of(rivals.RIVALS[1], tmp_path)


def test_differences_are_taken_image_by_image(rivals: Any) -> None:
    ours = torch.zeros(4, 5)
    theirs = ours.clone()
    theirs[0, 1], theirs[1, 2] = 0.5, -1e-4
    found = rivals.differences(theirs, ours)
    assert found["difference"] == 0.5
    assert found["images_apart"] == 1
