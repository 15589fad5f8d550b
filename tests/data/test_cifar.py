"""CIFAR by name, and real archives."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import shared_path
from listing import pairs, write_images
from torchvision.datasets import CIFAR10

from cpvit.data import find_samples
from cpvit.data.cifar import CIFAR10_CLASSES


def write_torchvision_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six images in torchvision's layout, whose checksums torchvision is told to expect."""
    rng = np.random.default_rng(0)
    batch = {"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8), "labels": [9, 0, 3]}
    contents = {"train_one": batch, "test_one": {**batch, "labels": [1, 1, 2]}}
    contents["batches.meta"] = {"label_names": list(CIFAR10_CLASSES)}
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    md5 = {}
    for name, content in contents.items():
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        md5[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["train_one", md5["train_one"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_one", md5["test_one"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})


def test_cifar10_in_torchvision_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torchvision_cifar10(tmp_path, monkeypatch)
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        source = find_samples("cifar10", split="train", data_dir=root, download=True)
        assert pairs(source) == [
            ("train/00000", "truck"),
            ("train/00001", "airplane"),
            ("train/00002", "cat"),
        ]
    expected = CIFAR10(str(tmp_path), train=True)[2][0]
    image = source.reader.select(["train/00002"]).read("train/00002")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert find_samples("CIFAR10", data_dir=tmp_path).split_name == "test"
    assert find_samples("cifar10", split="val", data_dir=tmp_path).split_name == "test"


def test_cifar10_classes_do_not_depend_on_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torchvision_cifar10(tmp_path, monkeypatch)
    assert find_samples("cifar10", data_dir=tmp_path).classes == CIFAR10_CLASSES


def test_damaged_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torchvision_cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "test_one").write_bytes(b"evil pickle")
    with pytest.raises(ValueError, match=r"cifar-10-batches-py is incomplete or damaged .*--download"):
        find_samples("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("inside", ["", "cifar10"])
def test_cifar10_as_class_folders(tmp_path: Path, inside: str) -> None:
    names = [f"{split}/{name}/1.png" for split in ("train", "test") for name in CIFAR10_CLASSES]
    write_images(tmp_path / inside, *names)
    source = find_samples("cifar10", data_dir=tmp_path)
    assert source.classes == CIFAR10_CLASSES == tuple(sorted(CIFAR10_CLASSES))
    assert (source.split_name, len(source)) == ("test", 10)


def test_cifar_from_the_wrong_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat/1.png", "test/cat/1.png")
    with pytest.raises(ValueError, match=r"is not cifar10: expected airplane, .* got 1 classes \(cat"):
        find_samples("cifar10", data_dir=tmp_path)
    with pytest.raises(ValueError, match="is not cifar100: expected 100 class folders"):
        find_samples("cifar100", data_dir=tmp_path)


def test_cifar_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no cifar10 in .*--download .*--data-dir .*cifar-10-batches-py"
    ):
        find_samples("cifar10", data_dir=tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no cifar100 in .*\.cache/cpvit; .*cifar-100-python"):
        find_samples("cifar100")


def test_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: CIFAR10) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", refuse)
    with pytest.raises(OSError, match=r"cannot download cifar10 to .*: no route to host"):
        find_samples("cifar10", data_dir=tmp_path, download=True)


def test_options_that_do_not_apply(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/1.png")
    for options in ({"download": True}, {"data_dir": tmp_path}):
        with pytest.raises(ValueError, match="are for cifar10 and cifar100, but the source is"):
            find_samples(tmp_path, **options)


def test_torchvision_cifar_named_as_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (folder, tmp_path):
        with pytest.raises(ValueError, match=r"torchvision's copy of cifar10; use cifar10 with --data-dir"):
            find_samples(path)


def test_real_cifar_archive() -> None:
    path = shared_path("data/cifar10-jpeg.tar.gz")
    source = find_samples(path, split="test")
    assert source.classes == CIFAR10_CLASSES
    assert (len(source), source.split_name) == (10000, "test")
    limited = source.limited(25, seed=3)
    assert set(Counter(sample.class_name for sample in limited.samples).values()) == {2, 3}
    keys = [sample.key for sample in limited.samples]
    reader = limited.reader.select(keys)
    assert all(reader.read(key).size == (32, 32) for key in keys)
