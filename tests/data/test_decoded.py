"""Batches decoded once: the same a second time, to the last bit, without reading an image again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from cpvit.commands.cli import main
from cpvit.data import BadImageError, Preprocessing, find_samples, make_loader
from cpvit.data.archives import TarReader
from cpvit.data.decoded import decoded_once
from cpvit.data.loader import Batches


def folder(root: Path, *, bad: bool = False) -> Path:
    root.mkdir()
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    if bad:
        (root / "3.png").write_bytes(b"no image")
    return root


def batches_of(root: Path, preprocessing: Preprocessing, *, skip: bool = False) -> Batches:
    source = find_samples(root)
    return make_loader(source, preprocessing, labels=None, batch_size=3, skip_bad_images=skip)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing((24, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        Preprocessing((24, 24), (0.5,) * 3, (0.5,) * 3, interpolation="bilinear", crop_pct=1.0),
        Preprocessing((24, 24), (0.0,) * 3, (1.0,) * 3, crop_pct=0.9),
    ],
)
def test_every_time_gives_the_same(tmp_path: Path, preprocessing: Preprocessing) -> None:
    root = folder(tmp_path / "images", bad=True)
    expected = list(batches_of(root, preprocessing, skip=True))
    with decoded_once(batches_of(root, preprocessing, skip=True), preprocessing) as batches:
        found = [list(batches)]
        for path in root.iterdir():
            path.unlink()
        found += [list(batches), list(batches)]
        assert batches.skipped == ["3.png"]
        assert (len(batches), batches.num_images) == (3, 7)
    for time in found:
        assert [batch.keys for batch in time] == [batch.keys for batch in expected]
        assert all(torch.equal(a.images, b.images) for a, b in zip(time, expected, strict=True))


def test_a_first_time_that_is_broken_off_is_no_first_time(tmp_path: Path) -> None:
    root, values = folder(tmp_path / "images"), Preprocessing((24, 24), (0.5,) * 3, (0.5,) * 3)
    with decoded_once(batches_of(root, values), values) as batches:
        next(iter(batches))
        (root / "5.png").write_bytes(b"no image")
        with pytest.raises(BadImageError, match=r"5\.png"):
            list(batches)


def test_a_sweep_reads_each_image_once(
    tmp_path: Path, tiny_tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model("test_vit", img_size=64, num_classes=3)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    read: list[str] = []
    plain = TarReader.read

    def counted(self: TarReader, key: str) -> Image.Image:
        read.append(key)
        return plain(self, key)

    monkeypatch.setattr(TarReader, "read", counted)
    line = ["sweep", "--model", "test_vit", "--image-size", "64", "--device", "cpu", "--data", str(tiny_tar)]
    line += [
        "--checkpoint",
        str(tmp_path / "tiny.safetensors"),
        "--methods",
        "tome,cpvit",
        "--macs",
        "0.8,0.7",
    ]
    assert main(line) == 0
    assert len(read) == len(set(read)) == 12
