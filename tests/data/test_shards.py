"""Shards: which files they are, what a damaged one says, and that streaming is addressable all the same."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cpvit.data import (
    Augmentation,
    BadArchiveError,
    BadImageError,
    ImageSource,
    Mixing,
    Preprocessing,
    ShardSource,
    TrainBatch,
    TrainBatches,
    find_samples,
    label_map,
    make_loader,
    make_train_batches,
    open_data,
    open_shards,
)
from cpvit.data.order import Share, stream_order
from cpvit.data.shards import shuffled_stream

SMALL = Preprocessing(image_size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)
PLAIN = Augmentation(random_resized_crop=False, flip=0.0)
# Forking is what is tested, and there may be more workers than cores.
WORKERS = pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create"
)
CLASSES = 40
SIZES = (7, 3, 11, 0, 5)
TOTAL = sum(SIZES)


def png(value: int) -> bytes:
    """An image whose red says which it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(number: int) -> list[tuple[str, bytes]]:
    """Image `number` with label `number`, in one of the ways it may be stored."""
    stem = f"{number:06d}"
    image, cls = (f"{stem}.png", png(number)), (f"{stem}.cls", str(number).encode())
    described = (f"{stem}.json", json.dumps({"label": number, "width": 8}).encode())
    return [[image, cls], [cls, image], [image, described], [described, cls, image, (f"{stem}.txt", b"x")]][
        number % 4
    ]


def write_shards(folder: Path, sizes: Sequence[int] = SIZES, name: str = "train-{:06d}.tar") -> Path:
    number = 0
    for index, size in enumerate(sizes):
        members = [member for n in range(number, number + size) for member in sample(n)]
        write_tar(folder / name.format(index), members)
        number += size
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ShardSource:
    """26 samples in 5 shards."""
    return open_shards(write_shards(tmp_path_factory.mktemp("shards")))


def batches_of(
    source: ShardSource, *, batch_size: int = 4, augmentation: Augmentation = PLAIN, **options: int
) -> TrainBatches:
    return make_train_batches(
        source,
        SMALL,
        labels=label_map(source, CLASSES),
        num_classes=CLASSES,
        batch_size=batch_size,
        seed=3,
        augmentation=augmentation,
        mixing=Mixing(),
        **{"shuffle_buffer": 6, **options},
    )


def take(batches: TrainBatches, count: int, start: int = 0) -> list[TrainBatch]:
    return list(islice(batches.starting_at(start), count))


def labels_of(batches: Sequence[TrainBatch]) -> list[int]:
    return torch.cat([batch.labels for batch in batches]).tolist()


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


def test_find_samples_points_to_open_data(source: ShardSource) -> None:
    with pytest.raises(
        ValueError, match=r"names shards, which are read as a stream .*; open it with open_data"
    ):
        find_samples(source.shards[0].parent)


def test_junk_is_passed_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("._000001.png", b"junk"), *sample(1), ("folder/._000002.png", b"junk")])
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "README.md").touch()
    assert open_shards(tmp_path).sizes == (1,)


def test_a_part_of_the_samples_is_refused(source: ShardSource) -> None:
    assert source.limited(None) is source.limited(TOTAL) is source
    with pytest.raises(
        ValueError, match=r"cannot take 5 of the 26 samples of .*; name fewer of them with braces"
    ):
        source.limited(5)
    with pytest.raises(
        ValueError, match=r"cannot set 5 of the 26 samples of .* apart: .*; name different shards"
    ):
        source.split(5)


# --- sizes ---


def test_sizes_are_trusted_until_proved_wrong(tmp_path: Path) -> None:
    write_shards(tmp_path, (3, 2))
    for size, message in (
        (4, r"train-000000\.tar holds 3 samples where 4"),
        (2, r"holds more samples where 2"),
    ):
        (tmp_path / "sizes.json").write_text(json.dumps({"train-000000.tar": size, "train-000001.tar": 2}))
        source = open_shards(tmp_path)
        assert source.sizes == (size, 2)
        with pytest.raises(
            BadArchiveError, match=message + r" were expected; was it, or the sizes\.json beside it"
        ):
            list(make_loader(source, SMALL, labels=None, batch_size=4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"sizes\.json is not JSON \(.*\); repair it, or remove it"),
        ("[3]", r"sizes\.json should hold the number of samples of each shard"),
        ('{"train-000000.tar": "3"}', r"sizes\.json should hold the number of samples of each shard"),
        ('{"other.tar": 3}', r"sizes\.json does not know train-000000\.tar; add it, or remove the file"),
    ],
)
def test_sizes_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    write_shards(tmp_path, (3,))
    (tmp_path / "sizes.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_shards(tmp_path)


def test_no_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no samples in the 2 shards of"):
        open_shards(write_shards(tmp_path / "a", (0, 0)))
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"no shards in .*; expected \.tar files"):
        open_shards(tmp_path / "b")


# --- training ---


@pytest.mark.parametrize("buffer", [1, 6, 1000])
def test_an_epoch_has_each_sample_once_with_its_label(source: ShardSource, buffer: int) -> None:
    batches = batches_of(source, batch_size=2, shuffle_buffer=buffer)
    assert (batches.num_images, batches.steps_per_epoch) == (TOTAL, 13)
    found = take(batches, 39)
    epochs = [labels_of(found[start : start + 13]) for start in (0, 13, 26)]
    assert all(sorted(epoch) == list(range(TOTAL)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for batch in found:
        assert (batch.images[:, 0, 0, 0] * 255).round().int().tolist() == batch.labels.tolist()


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("start", [0, 5, 6, 20])
def test_a_stream_can_start_at_any_step(source: ShardSource, num_workers: int, start: int) -> None:
    augmentation = Augmentation(random_erasing=0.5)
    whole = take(batches_of(source, augmentation=augmentation), 26)
    resumed = take(batches_of(source, augmentation=augmentation, num_workers=num_workers), 6, start=start)
    for expected, found in zip(whole[start : start + 6], resumed, strict=True):
        assert expected.step == found.step
        assert torch.equal(expected.images, found.images)
        assert torch.equal(expected.labels, found.labels)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_stream_one_large_batch(source: ShardSource, world_size: int) -> None:
    large = take(batches_of(source, batch_size=2 * world_size), 15)
    ranks = [
        take(batches_of(source, batch_size=2, rank=r, world_size=world_size), 15) for r in range(world_size)
    ]
    for step, expected in enumerate(large):
        assert torch.equal(torch.cat([batches[step].images for batches in ranks]), expected.images)
        assert torch.equal(torch.cat([batches[step].labels for batches in ranks]), expected.labels)


def test_no_sample_leaves_the_buffer_far_from_its_place() -> None:
    sizes, buffer = (400, 300, 500), 50
    order = stream_order(sizes, seed=1, epoch=2, buffer=buffer)
    within_epoch = order.numbers - 2 * sum(sizes)
    assert sorted(within_epoch) == list(range(1200))
    shift = within_epoch - np.arange(1200)
    assert np.abs(shift).max() < buffer
    assert np.abs(shift).mean() > buffer / 8
    assert sorted(order.files) == [0, 1, 2]


def test_resuming_reads_no_more_than_it_must(source: ShardSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents of samples before the step are never read, nor are shards that are over."""
    opened: list[str] = []
    read: list[bytes] = []
    real_open = Path.open

    def spy_open(path: Path, *args: str) -> io.BufferedReader:
        opened.append(path.name)
        return real_open(path, *args)  # type: ignore[return-value]

    from cpvit.data import shards

    real_read = shards.read_extent
    monkeypatch.setattr(Path, "open", spy_open)
    monkeypatch.setattr(shards, "read_extent", lambda *args: read.append(real_read(*args)) or read[-1])
    share = Share(batch_size=1, first=TOTAL - 2)
    (first, second) = islice(shuffled_stream(source, share, 3, 1), 2)
    assert [first[0], second[0]] == [TOTAL - 2, TOTAL - 1]
    assert len(set(opened)) == 1
    assert len(read) == 4  # two images with a label each


# --- evaluation ---


@WORKERS
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (3, 0), (30, 0), (1, 2), (2, 2)])
def test_processes_evaluate_each_sample_once(source: ShardSource, world_size: int, num_workers: int) -> None:
    options = {"labels": label_map(source, CLASSES), "batch_size": 4, "num_workers": num_workers}
    shares = [make_loader(source, SMALL, **options, rank=r, world_size=world_size) for r in range(world_size)]
    found = [list(share) for share in shares]
    assert torch.cat([batch.labels for batches in found for batch in batches]).tolist() == list(range(TOTAL))
    assert [len(batches) for batches in found] == [len(share) for share in shares]
    for batches in found:
        assert all(len(batch.keys) == 4 for batch in batches[:-1])
        for batch in batches:
            assert (batch.images[:, 0, 0, 0] * 255).round().int().tolist() == batch.labels.tolist()


@WORKERS
def test_an_empty_share_of_shards_with_workers(source: ShardSource) -> None:
    share = make_loader(source, SMALL, labels=None, batch_size=4, num_workers=2, rank=0, world_size=30)
    assert (share.num_images, len(share), list(share)) == (0, 0, [])


def test_evaluation_without_labels(source: ShardSource) -> None:
    batches = list(make_loader(source, SMALL, labels=None, batch_size=10))
    assert [batch.labels for batch in batches] == [None] * 3
    assert batches[0].keys[0] == f"{source.shards[0]}:000000.png"


def test_class_names_as_labels(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar", [("1.png", png(1)), ("1.cls", b"cat\n"), ("2.png", png(2)), ("2.cls", b"007")]
    )
    (batch,) = make_loader(open_shards(tmp_path), SMALL, labels={"cat": 5, "7": 3}, batch_size=4)
    assert batch.labels.tolist() == [5, 3]


# --- what can be wrong ---


def messages(folder: Path, num_workers: int = 0) -> list[str]:
    """What training on and evaluating damaged shards says."""
    source = open_shards(folder)
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


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_label_out_of_range(tmp_path: Path, num_workers: int) -> None:
    write_tar(tmp_path / "a.tar", [*sample(1), ("x.png", png(2)), ("x.cls", b"40")])
    for message in messages(tmp_path, num_workers):
        assert message.startswith(
            f"{tmp_path}/a.tar:x.cls has label '40'; expected one of the 40 classes 0 to 39: use a model"
        )


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("x.png", png(2))], "a.tar:x.png has no label; expected a .cls file of the same name"),
        ([("x.png", png(2)), ("x.json", b"[]")], """a.tar:x.json is not JSON with a "label", but '[]'"""),
        ([("x.png", png(2)), ("x.json", b"{")], """a.tar:x.json is not JSON with a "label", but '{'"""),
    ],
)
def test_a_sample_without_label(tmp_path: Path, members: list[tuple[str, bytes]], expected: str) -> None:
    write_tar(tmp_path / "a.tar", [*sample(1), *members])
    for message in messages(tmp_path):
        assert message.startswith(f"{tmp_path}/{expected}")


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
    for message in messages(tmp_path, num_workers):
        assert message.startswith(f"cannot read image {tmp_path}/a.tar:x.png: Pillow does not recognise it")
    source = open_shards(tmp_path)
    batches = make_loader(
        source, SMALL, labels=None, batch_size=1, num_workers=num_workers, skip_bad_images=True
    )
    assert len(list(batches)) == 2
    assert batches.skipped == [f"{tmp_path}/a.tar:x.png"]
    with pytest.raises(BadImageError):
        take(batches_of(source, batch_size=1, num_workers=num_workers), 3)


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("where", ["header", "end"])
def test_a_damaged_shard(tmp_path: Path, where: str, num_workers: int) -> None:
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
    (tmp_path / "sizes.json").write_text('{"0.tar": 3, "1.tar": 4}')
    for message in messages(tmp_path, num_workers):
        assert message.startswith(f"cannot read {tmp_path}/1.tar as a tar archive")


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


def test_the_buffer_holds_something(source: ShardSource) -> None:
    with pytest.raises(ValueError, match=r"shuffle_buffer is 0; expected at least 1 sample"):
        batches_of(source, shuffle_buffer=0)
