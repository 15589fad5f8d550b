"""Shards: which files a name means, and what a damaged one says."""

from __future__ import annotations

import io
import resource
import tarfile
from pathlib import Path

import pytest
from sharding import (
    CLASSES,
    SIZES,
    SMALL,
    TOTAL,
    WORKERS,
    batches_of,
    png,
    sample,
    take,
    write_shards,
    write_tar,
)

from cpvit.data import (
    BadArchiveError,
    BadImageError,
    ImageSource,
    ShardSource,
    find_samples,
    label_map,
    make_loader,
    open_data,
    open_shards,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ShardSource:
    """26 samples in 5 shards."""
    return open_shards(write_shards(tmp_path_factory.mktemp("shards")))


# --- finding ---


def test_a_folder_of_shards(source: ShardSource) -> None:
    assert source.sizes == SIZES
    assert [shard.name for shard in source.shards] == [f"train-00000{index}.tar" for index in range(5)]
    assert (len(source), source.split_name) == (TOTAL, None)


def test_a_pattern(tmp_path: Path) -> None:
    write_shards(tmp_path, (1,) * 12, "part-{:04d}.tar")
    source = open_shards(tmp_path / "part-{0003..0010}.tar")
    assert [shard.name for shard in source.shards] == [f"part-{index:04d}.tar" for index in range(3, 11)]
    both = open_data(str(tmp_path / "part-000{1,3}.tar"))
    assert isinstance(both, ShardSource)
    assert [shard.name for shard in both.shards] == ["part-0001.tar", "part-0003.tar"]
    with pytest.raises(
        FileNotFoundError, match=r"2 of the 4 shards of .* are missing, for example .*part-0012\.tar"
    ):
        open_data(tmp_path / "part-{0010..0013}.tar")
    with pytest.raises(
        ValueError, match=r"\{3\.\.1\} counts down; expected a range such as \{000000\.\.000012\}"
    ):
        open_shards(tmp_path / "part-{3..1}.tar")


def test_split_folders_of_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", (3, 2), "{}.tar")
    write_shards(tmp_path / "val", (4,), "{}.tar")
    for split, size, name in (("train", 5, "train"), ("val", 4, "val"), (None, 4, "val")):
        source = open_data(tmp_path, split=split)
        assert isinstance(source, ShardSource)
        assert (len(source), source.split_name) == (size, name)


def test_shards_of_several_splits_in_one_folder(tmp_path: Path) -> None:
    write_shards(tmp_path, (1, 1), "imagenet-train-{:02d}.tar")
    write_shards(tmp_path, (1,), "imagenet-validation-{:02d}.tar")
    with pytest.raises(
        ValueError, match=r"holds shards of several splits \(train, validation, by their names\); name"
    ):
        open_data(tmp_path)
    assert len(open_shards(tmp_path / "imagenet-train-{00..01}.tar")) == 2


def test_other_data_is_no_shards(tmp_path: Path, tiny_tar: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(png(1))
    for path in (tmp_path, tiny_tar):
        assert isinstance(open_data(path), ImageSource)
    write_tar(tmp_path / "1.tar", sample(1))
    assert isinstance(open_data(tmp_path), ImageSource)


def test_find_samples_and_open_data_open_shards(source: ShardSource) -> None:
    for opened in (find_samples, open_data):
        found = opened(source.shards[0].parent)
        assert isinstance(found, ShardSource)
        assert list(found.samples) == list(source.samples)
    with pytest.raises(ValueError, match=r"data_dir and download .* are for cifar10 and cifar100"):
        find_samples(source.shards[0].parent, download=True)


def test_junk_is_passed_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("._000001.png", b"junk"), *sample(1), ("folder/._000002.png", b"junk")])
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "README.md").touch()
    assert open_shards(tmp_path).sizes == (1,)


def test_a_file_with_sizes_beside_the_shards_is_not_needed(tmp_path: Path) -> None:
    """Earlier versions read it."""
    write_shards(tmp_path, (3, 2))
    (tmp_path / "sizes.json").write_text('{"train-000000.tar": 7}')
    assert open_shards(tmp_path).sizes == (3, 2)


def test_thousands_of_shards_are_not_open_at_once(tmp_path: Path) -> None:
    write_shards(tmp_path, (1,) * 3 + (0,) * 1997, "{:04d}.tar")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 128), hard))
    try:
        source = open_shards(tmp_path / "{0000..1999}.tar")
        batches = list(make_loader(source, SMALL, labels=label_map(source, CLASSES), batch_size=1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (len(source.shards), len(batches)) == (2000, 3)


def test_no_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no samples in the 2 shards of"):
        open_shards(write_shards(tmp_path / "a", (0, 0)))
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"no shards in .*; expected \.tar files"):
        open_shards(tmp_path / "b")


# --- what can be wrong ---


def messages(source: ShardSource, num_workers: int = 0) -> list[str]:
    """What training on and evaluating damaged shards says."""
    found = []
    for run in (
        lambda: take(batches_of(source, batch_size=1, num_workers=num_workers), len(source)),
        lambda: list(
            make_loader(
                source, SMALL, labels=label_map(source, CLASSES), batch_size=1, num_workers=num_workers
            )
        ),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            run()
        found.append(str(caught.value))
    return found


def test_a_label_out_of_range(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*sample(1), ("x.png", png(2)), ("x.cls", b"40")])
    for message in messages(open_shards(tmp_path)):
        assert message.startswith(
            f"{tmp_path}/a.tar:x.cls has label '40'; expected one of the 40 classes 0 to 39: use a model"
        )


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("x.png", png(2))], "a.tar:x.png has no label; expected a .cls file of the same name"),
        ([("x.png", png(2)), ("x.json", b"[]")], """a.tar:x.json is not JSON with a "label", but '[]'"""),
        ([("x.png", png(2)), ("x.json", b"{")], """a.tar:x.json is not JSON with a "label", but '{'"""),
        (
            [("x.png", png(2)), ("x.json", b"[" * 200_000)],
            """a.tar:x.json is not JSON with a "label", but '[[""",
        ),
        ([("x.png", png(2)), ("x.cls", bytes(2 << 20))], "a.tar:x.cls is no label: it has 2097152 bytes"),
    ],
)
def test_a_sample_without_label(tmp_path: Path, members: list[tuple[str, bytes]], expected: str) -> None:
    write_tar(tmp_path / "a.tar", [*sample(1), *members])
    for message in messages(open_shards(tmp_path)):
        assert message.startswith(f"{tmp_path}/{expected}")
    # Who needs no labels is not bothered.
    assert len(list(make_loader(open_shards(tmp_path), SMALL, labels=None, batch_size=1))) == 2


@pytest.mark.parametrize(
    "members",
    [
        [("x.cls", b"1")],
        [("x.png", png(1)), ("x.jpg", png(1)), ("x.cls", b"1")],
        [("x.png", png(1)), ("x.cls", b"1"), ("x.png", png(1)), ("x.cls", b"1")],
    ],
)
def test_a_sample_without_one_image(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    write_tar(tmp_path / "a.tar", [*sample(1), *members])
    with pytest.raises(
        ValueError, match=r"a\.tar: sample x should have one image \(jpg, .* its files are x\."
    ):
        open_shards(tmp_path)


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_cannot_be_decoded(tmp_path: Path, num_workers: int) -> None:
    write_tar(tmp_path / "a.tar", [*sample(1), ("x.png", b"no image"), ("x.cls", b"1"), *sample(2)])
    for message in messages(open_shards(tmp_path), num_workers):
        assert message.startswith(f"cannot read image {tmp_path}/a.tar:x.png: Pillow does not recognise it")
    source = open_shards(tmp_path)
    batches = make_loader(
        source, SMALL, labels=None, batch_size=1, num_workers=num_workers, skip_bad_images=True
    )
    assert len(list(batches)) == 2
    assert batches.skipped == [f"{tmp_path}/a.tar:x.png"]
    with pytest.raises(BadImageError):
        take(batches_of(source, batch_size=1, num_workers=num_workers), 3)


@pytest.mark.parametrize("where", ["header", "end"])
def test_a_damaged_shard(tmp_path: Path, where: str) -> None:
    write_shards(tmp_path, (3, 4), "{}.tar")
    shard = tmp_path / "1.tar"
    data = bytearray(shard.read_bytes())
    if where == "header":
        data[2048:2100] = b"\xff" * 52
    shard.write_bytes(data if where == "header" else data[:4000])
    with pytest.raises(
        BadArchiveError, match=r"cannot read .*1\.tar as a tar archive .*; if it is one, copy or"
    ):
        open_shards(tmp_path)


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_was_cut_off_after_it_was_opened(tmp_path: Path, num_workers: int) -> None:
    source = open_shards(write_shards(tmp_path, (3, 4), "{}.tar"))
    shard = tmp_path / "1.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    for message in messages(source, num_workers):
        assert message.startswith(f"cannot read {tmp_path}/1.tar as a tar archive")
        assert "Traceback" not in message


def test_a_shard_that_is_gone(tmp_path: Path) -> None:
    source = open_shards(write_shards(tmp_path, (3, 4), "{}.tar"))
    (tmp_path / "1.tar").unlink()
    with pytest.raises(BadArchiveError, match=r"cannot read .*1\.tar .*No such file or directory"):
        list(make_loader(source, SMALL, labels=None, batch_size=1))


def test_a_compressed_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample(1), "w:gz")
    with pytest.raises(
        ValueError, match=r"a\.tar is compressed, but shards are read in place; decompress it to"
    ):
        open_shards(tmp_path)


def test_hostile_members(tmp_path: Path) -> None:
    """Links and devices are passed over, names reach no file, and a NUL in a name is refused."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("x.png", tarfile.REGTYPE),
            ("x.cls", tarfile.SYMTYPE),
            ("../../etc/y.png", tarfile.REGTYPE),
            ("z.png", tarfile.LNKTYPE),
            ("w.png", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            data = png(1) if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = open_shards(tmp_path)
    assert [sample.key for sample in source.samples] == [f"{path}:x.png", f"{path}:../../etc/y.png"]
    assert source.class_names == [None, None]
    assert source.reader.read(f"{path}:../../etc/y.png").getpixel((0, 0)) == (1, 0, 0)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("x.png")
        member.pax_headers = {"path": "a\0b.png"}
        archive.addfile(member, io.BytesIO())
    with pytest.raises(BadArchiveError, match=r"'a\\x00b\.png' has a NUL in its name"):
        open_shards(tmp_path)
