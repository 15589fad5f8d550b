"""Listing images: folders, splits and junk."""

from __future__ import annotations

from pathlib import Path

import pytest
from listing import encoded, pairs, write_images, write_tar

from cpvit.data import find_samples


def test_class_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "dog/b.png", "dog/a.png", "cat/x.png", "cat/deep/y.png")
    source = find_samples(tmp_path)
    assert source.classes == ("cat", "dog")
    assert pairs(source) == [
        ("cat/deep/y.png", "cat"),
        ("cat/x.png", "cat"),
        ("dog/a.png", "dog"),
        ("dog/b.png", "dog"),
    ]
    assert (source.name, source.split_name, len(source)) == (tmp_path.name, None, 4)


def test_split_argument_changes_nothing_without_split_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "dog/a.png", "cat/x.png")
    assert find_samples(tmp_path, split="train") == find_samples(tmp_path, split="test")


@pytest.mark.parametrize(
    ("folders", "split", "expected"),
    [
        (("train", "val", "test"), None, "test"),
        (("train", "val", "test"), "test", "test"),
        (("train", "val", "test"), "val", "val"),
        (("train", "val", "test"), "train", "train"),
        (("train", "val"), None, "val"),
        (("train", "validation"), "test", "validation"),
        (("train", "test"), "val", "test"),
        (("Train", "Test"), "train", "Train"),
        (("val",), None, "val"),
        (("train", "val", "extra"), None, "val"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_split_folders(
    tmp_path: Path, folders: tuple[str, ...], split: str | None, expected: str, kind: str
) -> None:
    names = [f"top/{folder}/{name}/1.png" for folder in folders for name in ("cat", "dog")]
    root = write_images(tmp_path / "root", *names)
    if kind == "tar":
        root = write_tar(tmp_path / "root.tar", {name: encoded() for name in names})
    source = find_samples(root, split=split)
    assert source.split_name == expected
    assert pairs(source) == [(f"top/{expected}/cat/1.png", "cat"), (f"top/{expected}/dog/1.png", "dog")]


def test_split_that_is_missing(tmp_path: Path) -> None:
    write_images(tmp_path / "a", "test/cat/1.png")
    with pytest.raises(ValueError, match=r"no folder for split 'train', only test/; choose the split"):
        find_samples(tmp_path / "a", split="train")
    write_images(tmp_path / "b", "train/cat/1.png")
    with pytest.raises(ValueError, match=r"no held-out split \(test/ or val/\), only train/"):
        find_samples(tmp_path / "b")


def test_split_that_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="split is 'evaluation'; expected one of train, val, test, validation"
    ):
        find_samples(tmp_path, split="evaluation")


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    write_images(tmp_path, "bus/1.png", "plane/1.png", "train/1.png")
    assert find_samples(tmp_path).classes == ("bus", "plane", "train")


def test_wordnet_id_above_another_folder(tmp_path: Path) -> None:
    names = [f"train/{wnid}/images/1.png" for wnid in ("n01440764", "n01443537")]
    write_images(tmp_path / "root", *names)
    archive = write_tar(tmp_path / "root.tar", dict.fromkeys(names, encoded()))
    for source in (find_samples(tmp_path / "root", split="train"), find_samples(archive, split="train")):
        assert source.classes == ("n01440764", "n01443537")


def test_junk_is_ignored(tmp_path: Path) -> None:
    junk = (".DS_Store", "._1.png", "Thumbs.db", "README.md", "labels.txt", "meta.json", "list.csv", "README")
    names = [f"cat/{name}" for name in junk] + ["__MACOSX/cat/1.png", ".hidden/cat/1.png", "labels.csv"]
    write_images(tmp_path / "root", "cat/1.png", "readme/1.png", *names)
    archive = write_tar(tmp_path / "x.tar", dict.fromkeys(["cat/1.png", "readme/1.png", *names], encoded()))
    for source in (find_samples(tmp_path / "root"), find_samples(archive)):
        assert pairs(source) == [("cat/1.png", "cat"), ("readme/1.png", "readme")]


def test_other_extensions_count_as_images(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/1.png", "cat/2.bin")
    assert [sample.key for sample in find_samples(tmp_path).samples] == ["cat/1.png", "cat/2.bin"]


def test_plain_images_have_no_class(tmp_path: Path) -> None:
    source = find_samples(write_images(tmp_path, "b.png", "a.png"))
    assert pairs(source) == [("a.png", None), ("b.png", None)]
    assert source.classes == ()


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", "1.png")
    root = write_images(tmp_path / "root", "dog/1.png")
    (root / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "dog" / "again").symlink_to(root / "dog", target_is_directory=True)
    assert pairs(find_samples(root)) == [("cat/1.png", "cat"), ("dog/1.png", "dog")]


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere; give cifar10"):
        find_samples(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing else here")
    with pytest.raises(ValueError, match=r"no images in .*expected <class>/<image>"):
        find_samples(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*test; expected"):
        find_samples(tmp_path)
