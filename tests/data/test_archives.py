"""Listing and reading images in archives, damaged and hostile ones too."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from listing import encoded, pairs, write_images, write_tar

from cpvit.data import BadArchiveError, find_samples


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
