"""Images in shards are images like any other: in any order, any part of them, for any number of workers."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sharding import (
    CLASSES,
    SMALL,
    TOTAL,
    WORKERS,
    batches_of,
    labels_of,
    png,
    take,
    write_shards,
    write_tar,
)

from cpvit.data import (
    Augmentation,
    ImageSource,
    ShardSource,
    find_samples,
    label_map,
    make_loader,
    open_shards,
)
from cpvit.data.order import shuffled_blocks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ShardSource:
    """26 samples in 5 shards."""
    return open_shards(write_shards(tmp_path_factory.mktemp("shards")))


# --- reading ---


def test_any_order_gives_what_reading_from_front_to_back_gives(source: ShardSource) -> None:
    stored = {}
    for shard in source.shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                stored[f"{shard}:{member.name}"] = archive.extractfile(member).read()  # type: ignore[union-attr]
    keys = [sample.key for sample in source.samples]
    assert keys == [key for key in stored if key.endswith(".png")]
    for position in np.random.default_rng(0).permutation(TOTAL):
        sample = source.samples[position]
        assert sample.class_name == str(position)
        assert stored[sample.key] == png(int(position))
        assert source.reader.read(sample.key).getpixel((0, 0)) == (position, 0, 0)


def test_the_samples_are_a_sequence(source: ShardSource) -> None:
    part = source.samples[3:9]
    assert list(part) == list(source.samples)[3:9]
    assert part[-1] == source.samples[8]
    with pytest.raises(IndexError):
        part[6]
    with pytest.raises(KeyError):
        source.reader.read("elsewhere.tar:000000.png")


def test_names_that_look_like_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    write_tar(
        folder / "c.tar", [("1:2.png", png(1)), ("2.png", png(2)), ("d/2.png", png(3)), ("ü.png", png(4))]
    )
    source = open_shards(folder)
    reader = pickle.loads(pickle.dumps(source.reader))
    assert [reader.read(sample.key).getpixel((0, 0))[0] for sample in source.samples] == [1, 2, 3, 4]


def test_an_index_is_small(tmp_path: Path) -> None:
    """Arrays and bytes, no object per image."""
    write_tar(tmp_path / "a.tar", [(f"{number:08d}.png", b"x") for number in range(3000)])
    assert len(pickle.dumps(open_shards(tmp_path).reader)) < 3000 * 50


# --- parts ---


def as_folder(source: ShardSource, root: Path) -> ImageSource:
    """The same images in class folders, in the same order by name."""
    for position in range(len(source)):
        path = root / f"{position % 3}" / f"{position:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(position))
    return find_samples(root)


def in_three_classes(folder: Path) -> ShardSource:
    for shard in range(4):
        numbers = range(5 * shard, 5 * shard + 5)
        write_tar(
            folder / f"{shard}.tar",
            [
                member
                for n in numbers
                for member in ((f"{n:06d}.png", png(n)), (f"{n:06d}.cls", str(n % 3).encode()))
            ],
        )
    return open_shards(folder)


def reds(source: ImageSource) -> set[int]:
    return {source.reader.read(sample.key).getpixel((0, 0))[0] for sample in source.samples}  # type: ignore[index]


@pytest.mark.parametrize("limit", [1, 5, 12, 19])
@pytest.mark.parametrize("seed", [0, 4])
def test_a_limit_takes_the_images_that_it_takes_of_a_folder(tmp_path: Path, limit: int, seed: int) -> None:
    shards = in_three_classes(tmp_path / "shards")
    folder = as_folder(shards, tmp_path / "folder")
    limited = shards.limited(limit, seed)
    assert reds(limited) == reds(folder.limited(limit, seed))
    assert len(limited) == limit
    assert [reds(part) for part in shards.split(limit, seed)] == [
        reds(part) for part in folder.split(limit, seed)
    ]
    assert isinstance(limited, ShardSource)
    assert limited.is_part
    assert sum(limited.sizes) == limit
    keys = [sample.key for sample in limited.samples]
    assert keys == [sample.key for sample in shards.samples if sample.key in keys], "in the order of storage"


def test_no_limit_is_all_of_it(source: ShardSource) -> None:
    assert source.limited(None) is source.limited(TOTAL) is source
    assert not source.is_part
    with pytest.raises(ValueError, match="limit is 0; expected at least 1 image, or None for all 26"):
        source.limited(0)
    with pytest.raises(ValueError, match="cannot take 26 of the 26 images"):
        source.split(26)


def test_training_on_a_part(source: ShardSource) -> None:
    part = source.limited(13, 1)
    found = take(batches_of(part, batch_size=1), 39)
    own = sorted(int(sample.class_name or "") for sample in part.samples)
    for start in (0, 13, 26):
        assert sorted(labels_of(found[start : start + 13])) == own


# --- training ---


# Pinned: runs that were saved by earlier versions go on with these images.
EPOCHS = {
    1: "10 11 12 13 14 15 16 17 18 19 20 7 8 9 0 1 2 3 4 5 6 21 22 23 24 25",
    6: "10 12 11 13 14 15 18 16 19 17 8 7 9 20 1 0 5 2 3 22 4 6 23 24 21 25",
    1000: "18 5 12 9 14 22 13 1 23 24 8 10 11 7 15 25 6 19 0 16 2 4 20 3 17 21",
}


@pytest.mark.parametrize("buffer", EPOCHS)
def test_the_order_does_not_change_between_versions(source: ShardSource, buffer: int) -> None:
    found = labels_of(take(batches_of(source, batch_size=2, shuffle_buffer=buffer), 13))
    assert " ".join(map(str, found)) == EPOCHS[buffer]


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
    order = shuffled_blocks(sizes, seed=1, epoch=2, buffer=buffer)
    assert sorted(order) == list(range(1200))
    shard = np.searchsorted(np.cumsum(sizes), order, "right")
    files = [int(file) for file in dict.fromkeys(shard[np.r_[0:1200:100]].tolist())]
    stream = np.concatenate([np.flatnonzero(np.repeat(range(3), sizes) == file) for file in files])
    shift = np.argsort(stream)[order] - np.arange(1200)
    assert np.abs(shift).max() < buffer
    assert np.abs(shift).mean() > buffer / 8
    other = shuffled_blocks(sizes, seed=1, epoch=3, buffer=buffer)
    assert not np.array_equal(order, other)


def test_the_buffer_holds_something(source: ShardSource) -> None:
    with pytest.raises(ValueError, match=r"shuffle_buffer is 0; expected at least 1 sample"):
        batches_of(source, shuffle_buffer=0)


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
