"""Files that people drop on the page are limited, and decoded as everywhere else."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from app_files import grey_png
from PIL import Image

from cpvit.app import uploads as module
from cpvit.app.uploads import UploadError, Uploads
from cpvit.data import Preprocessing

PREPROCESSING = Preprocessing((32, 48), (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def uploads() -> Uploads:
    return Uploads(PREPROCESSING)


def test_an_image_is_prepared_as_for_every_command(tmp_path: Path, uploads: Uploads) -> None:
    picture = Image.effect_noise((80, 60), 50).convert("RGB")
    picture.save(tmp_path / "a.png")
    expected = PREPROCESSING.transform()(picture)[None]
    torch.testing.assert_close(uploads.read(tmp_path / "a.png"), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read image x.png: the file is empty; repair or remove it$"),
        (
            b"no image",
            "cannot read image x.png: Pillow does not recognise it as an image .*; repair or remove",
        ),
        (pickle.dumps({"weights": 1}), "Pillow does not recognise it as an image"),
        (grey_png(64, 64)[:45], "cannot read image x.png: .*; repair or remove it$"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, uploads: Uploads, content: bytes, message: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UploadError, match=message):
        uploads.read(tmp_path / "x.png")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, uploads: Uploads, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    (tmp_path / "bomb.png").write_bytes(grey_png(side, side))
    assert (tmp_path / "bomb.png").stat().st_size < 1 << 20
    with pytest.raises(UploadError, match=r"bomb\.png") as caught:
        uploads.read(tmp_path / "bomb.png")
    assert f"{side}x{side} pixels, more than 40 million" in str(caught.value) or "bomb" in str(caught.value)


def test_too_many_bytes_are_refused(
    tmp_path: Path, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 3 << 20)
    (tmp_path / "big.png").write_bytes(bytes((3 << 20) + 1))
    with pytest.raises(UploadError, match=r"big\.png has more than 3 MB; give a smaller file"):
        uploads.read(tmp_path / "big.png")


def test_pillows_settings_are_left_as_they_were(uploads: Uploads, tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "JPEG")
    (tmp_path / "a.jpg").write_bytes(file.getvalue())
    assert uploads.read(tmp_path / "a.jpg").shape == (1, 3, 32, 48)
    assert before == Image.MAX_IMAGE_PIXELS
