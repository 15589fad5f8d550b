"""Listing images: folders, archives, splits, junk, CIFAR, and samples of them."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from cpvit.data import BadArchiveError, ImageSource, Sample, find_samples, split_samples
from cpvit.data.cifar import CIFAR10_CLASSES

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


def encoded(value: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (7, 5), (value, 2 * value, 255 - value)).save(buffer, kind)
    return buffer.getvalue()


def write_images(root: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(value))
    return root


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def pairs(source: ImageSource) -> list[tuple[str, str | None]]:
    return [(sample.key, sample.class_name) for sample in source.samples]


def shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        # Not an assert: pytest would print the whole environment when it fails.
        if os.environ.get("CI") == "true":
            pytest.fail(f"{path} is missing")
        pytest.skip(f"{path} is missing")
    return path


# --- folders ---


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


# --- archives ---


@pytest.mark.parametrize(
    ("name", "mode"),
    [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.tgz", "w:gz"), ("x.tar.bz2", "w:bz2"), ("x.tar.xz", "w:xz")],
)
def test_archive_equals_folder(tmp_path: Path, name: str, mode: str) -> None:
    names = [f"{folder}/{index}.png" for folder in ("cat", "dog", "emu") for index in range(4)]
    root = write_images(tmp_path / "root", *names)
    archive = write_tar(tmp_path / name, {key: (root / key).read_bytes() for key in reversed(names)}, mode)
    folder_source, tar_source = find_samples(root), find_samples(archive)
    assert tar_source.samples == folder_source.samples
    assert tar_source.limited(5, 3).samples == folder_source.limited(5, 3).samples
    key = names[5]
    expected = np.asarray(folder_source.reader.read(key))
    for reader in (tar_source.reader, tar_source.reader.select([key, names[0]]).select([key])):
        np.testing.assert_array_equal(np.asarray(reader.read(key)), expected)


def test_class_in_archive_is_the_parent_folder(tmp_path: Path) -> None:
    names = ["./part1/more/cat/1.png", "./part1/more/cat/sub/2.png", "./part2/dog/3.png"]
    source = find_samples(write_tar(tmp_path / "x.tar", dict.fromkeys(names, encoded())))
    assert pairs(source) == [
        ("part1/more/cat/1.png", "cat"),
        ("part1/more/cat/sub/2.png", "cat"),
        ("part2/dog/3.png", "dog"),
    ]


def test_archive_with_dangerous_members(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("/etc/cat/1.png", tarfile.REGTYPE),
            ("../../etc/dog/2.png", tarfile.REGTYPE),
            ("etc/cat/link.png", tarfile.SYMTYPE),
            ("etc/cat/hard.png", tarfile.LNKTYPE),
            ("etc/cat/device.png", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            data = encoded() if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = find_samples(path)
    assert pairs(source) == [("etc/cat/1.png", "cat"), ("etc/dog/2.png", "dog")]
    assert source.reader.read("etc/dog/2.png").size == (7, 5)
    assert os.listdir(tmp_path) == ["x.tar"]  # noqa: PTH208 (names are all we need)


def test_a_repeated_member_replaces_the_earlier_one(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"cat/1.png": encoded(1)})
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("cat/1.png")
        member.size = len(encoded(9))
        archive.addfile(member, io.BytesIO(encoded(9)))
    source = find_samples(path)
    assert len(source) == 1
    assert source.reader.read("cat/1.png").getpixel((0, 0)) == (9, 18, 246)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
def test_truncated_archives(tmp_path: Path, mode: str, part: float) -> None:
    rng = np.random.default_rng(0)
    members = {f"cat/{index}.png": rng.bytes(3000) for index in range(20)}
    path = write_tar(tmp_path / "cut.tar", members, mode)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data.rstrip(b"\0")) * part)])
    with pytest.raises(
        BadArchiveError, match=r"cannot read .*cut\.tar as a tar archive .*copy or download it again"
    ):
        find_samples(path)


def test_archive_cut_between_members(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cut.tar", {"cat/1.png": bytes(512), "cat/2.png": bytes(512)})
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(BadArchiveError, match="truncated or damaged at byte 1024"):
        find_samples(path)


def test_archive_with_a_damaged_header(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"cat/1.png": bytes(512), "cat/2.png": bytes(512)})
    data = bytearray(path.read_bytes())
    data[1024:1100] = b"\xff" * 76
    path.write_bytes(data)
    with pytest.raises(BadArchiveError, match="truncated or damaged at byte 1024"):
        find_samples(path)


@pytest.mark.parametrize("data", [b"", b"hello", encoded(), b"\x1f\x8b not gzip", b"PK\x03\x04" + bytes(999)])
def test_not_an_archive(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(data)
    with pytest.raises(BadArchiveError, match=r"cannot read .*x\.tar\.gz as a tar archive"):
        find_samples(path)


def test_archive_without_images(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"cat/notes.txt": b"hello"})
    with pytest.raises(ValueError, match=r"no images in .*x\.tar; expected members named"):
        find_samples(path)


def test_archive_that_changes_after_listing(tmp_path: Path) -> None:
    source = find_samples(write_tar(tmp_path / "x.tar", {"cat/1.png": encoded()}))
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(BadArchiveError, match="it ends within the member at byte 512"):
        source.reader.read("cat/1.png")


# --- limit and split ---


def listed(**counts: int) -> tuple[Sample, ...]:
    return tuple(Sample(f"{name}/{i:03d}", name) for name, count in counts.items() for i in range(count))


def test_limit_is_spread_over_classes() -> None:
    samples = listed(cat=20, dog=20, emu=2, fox=20)
    for count in range(1, 63):
        chosen, rest = split_samples(samples, count, seed=5)
        counts = Counter(sample.class_name for sample in chosen)
        large = [counts[name] for name in ("cat", "dog", "fox")]
        assert sum(counts.values()) == count
        assert max(large) - min(large) <= 1
        assert counts["emu"] == 2 or max(large) - counts["emu"] <= 1
        assert sorted([*chosen, *rest], key=lambda s: s.key) == list(samples)


def test_limit_depends_on_names_and_seed_only() -> None:
    samples = listed(cat=9, dog=11)
    chosen, _ = split_samples(samples, 6, seed=1)
    assert split_samples(reversed(samples), 6, seed=1)[0] == chosen
    assert split_samples(samples, 6, seed=2)[0] != chosen
    assert list(chosen) == sorted(chosen, key=lambda sample: sample.key)
    assert set(chosen) < set(split_samples(samples, 7, seed=1)[0])
    # Pinned: the sample of a published result must not change between versions.
    assert [sample.key for sample in chosen] == [
        "cat/000",
        "cat/002",
        "cat/005",
        "dog/000",
        "dog/002",
        "dog/004",
    ]


def test_limited_source(tmp_path: Path) -> None:
    source = find_samples(write_images(tmp_path, *(f"{name}/{i}.png" for name in "abc" for i in range(3))))
    limited = source.limited(2)
    assert len(limited) == 2
    assert limited.classes == ("a", "b", "c")
    assert source.limited(None) is source
    assert source.limited(99) is source
    with pytest.raises(ValueError, match="limit is 0; expected at least 1 image, or None for all 9"):
        source.limited(0)


def test_split_into_disjoint_parts(tmp_path: Path) -> None:
    source = find_samples(write_images(tmp_path, *(f"{name}/{i}.png" for name in "abc" for i in range(3))))
    chosen, rest = source.split(6, seed=4)
    assert Counter(sample.class_name for sample in chosen.samples) == {"a": 2, "b": 2, "c": 2}
    assert sorted(pairs(chosen) + pairs(rest)) == pairs(source)
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"cannot take {count} of the 9 images .* between 1 and 8"):
            source.split(count)


# --- CIFAR ---


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


# --- real data ---


def test_real_cifar_archive() -> None:
    path = shared("cifar10-jpeg.tar.gz")
    source = find_samples(path, split="test")
    assert source.classes == CIFAR10_CLASSES
    assert (len(source), source.split_name) == (10000, "test")
    limited = source.limited(25, seed=3)
    assert set(Counter(sample.class_name for sample in limited.samples).values()) == {2, 3}
    keys = [sample.key for sample in limited.samples]
    reader = limited.reader.select(keys)
    assert all(reader.read(key).size == (32, 32) for key in keys)
