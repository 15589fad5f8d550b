"""Batches for evaluation: right labels, and an account of bad images."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from conftest import shared_path
from pictures import SMALL, WORKERS, encoded, images_of, noise, pack, write_classes
from torchvision.datasets import ImageFolder

from cpvit.data import (
    BadImageError,
    ImageSource,
    Sample,
    find_samples,
    label_map,
    make_loader,
)


def test_batches_are_imagefolders(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "root")
    source = find_samples(root)
    batches = make_loader(source, SMALL, labels=label_map(source, 3), batch_size=4)
    found = list(batches)
    reference = ImageFolder(str(root), transform=SMALL.transform())
    assert torch.equal(images_of(found), torch.stack([image for image, _ in reference]))
    assert torch.cat([batch.labels for batch in found]).tolist() == reference.targets
    assert [len(batch.keys) for batch in found] == [4, 4, 1]
    assert (len(batches), batches.num_images, batches.skipped) == (3, 9, [])
    assert found[0].images.shape == (4, 3, 13, 11)
    assert (found[0].images.dtype, found[0].labels.dtype) == (torch.float32, torch.int64)
    assert found[0].keys == ("cat/0.jpg", "cat/1.jpg", "cat/2.jpg", "dog/0.jpg")


def test_batches_can_be_iterated_again(tmp_path: Path) -> None:
    batches = make_loader(find_samples(write_classes(tmp_path / "root")), SMALL, labels=None, batch_size=2)
    assert torch.equal(images_of(batches), images_of(batches))


@WORKERS
@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz")])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_archives_give_the_batches_of_the_folder(
    tmp_path: Path, name: str, mode: str, num_workers: int
) -> None:
    root = write_classes(tmp_path / "root")
    expected = images_of(make_loader(find_samples(root), SMALL, labels=None, batch_size=2))
    source = find_samples(pack(root, tmp_path / name, mode))
    labels = label_map(source, 3)
    found = list(make_loader(source, SMALL, labels=labels, batch_size=2, num_workers=num_workers))
    assert torch.equal(images_of(found), expected)
    assert torch.cat([batch.labels for batch in found]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_labels_belong_to_the_head_after_limit(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "root", classes=("n01440764", "n02119789", "n15075141"))
    source = find_samples(root).limited(2)
    found = next(iter(make_loader(source, SMALL, labels=label_map(source, 1000), batch_size=2)))
    assert set(found.labels.tolist()) < {0, 278, 999}


def test_images_without_classes(tmp_path: Path) -> None:
    (tmp_path / "only.jpg").write_bytes(encoded(noise(1)))
    source = find_samples(tmp_path)
    batch = next(iter(make_loader(source, SMALL, labels=None, batch_size=8)))
    assert batch.labels is None
    with pytest.raises(ValueError, match=r"1 images without a label, for example only\.jpg; put them into"):
        make_loader(source, SMALL, labels={"cat": 0}, batch_size=8)


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    batches = make_loader(find_samples(write_classes(tmp_path / "root")), SMALL, labels=None, batch_size=2)
    before = torch.get_rng_state()
    list(batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_options(tmp_path: Path) -> None:
    source = find_samples(write_classes(tmp_path / "root"))
    for options in ({"batch_size": 0}, {"batch_size": 1, "num_workers": -1}):
        with pytest.raises(
            ValueError, match=r"batch_size is .* and num_workers .*; expected at least 1 and 0"
        ):
            make_loader(source, SMALL, labels=None, **options)
    empty = ImageSource("nothing", (), (), source.reader)
    with pytest.raises(ValueError, match="nothing holds no images"):
        make_loader(empty, SMALL, labels=None, batch_size=1)


def spoil(root: Path) -> Path:
    whole = (root / "cat" / "1.jpg").read_bytes()
    (root / "cat" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "1.jpg").write_text("not an image")
    (root / "dog" / "3.unknown").write_bytes(b"")
    return root


SPOILT = ["cat/1.jpg", "dog/1.jpg", "dog/3.unknown"]


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("archive", ["", "x.tar", "x.tgz"])
def test_bad_images_are_an_error(tmp_path: Path, archive: str, num_workers: int) -> None:
    where = spoil(write_classes(tmp_path / "root"))
    name = str(where / "cat" / "1.jpg")
    if archive:
        where = pack(where, tmp_path / archive, "w:gz" if archive.endswith("gz") else "w")
        name = f"{where}:root/cat/1.jpg"
    batches = make_loader(find_samples(where), SMALL, labels=None, batch_size=4, num_workers=num_workers)
    with pytest.raises(
        BadImageError, match=r"(?i)truncated.*; repair or remove it, or leave such files out"
    ) as caught:
        list(batches)
    assert str(caught.value).startswith(f"cannot read image {name}: ")
    assert "Traceback" not in str(caught.value)


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_can_be_skipped(tmp_path: Path, num_workers: int) -> None:
    root = spoil(write_classes(tmp_path / "root"))
    source = find_samples(root)
    options = {"labels": label_map(source, 3), "batch_size": 2, "num_workers": num_workers}
    batches = make_loader(source, SMALL, skip_bad_images=True, **options)
    for _ in range(2):
        found = list(batches)
        assert batches.skipped == SPOILT
        assert sum(len(batch.keys) for batch in found) == batches.num_images - 3 == 7
        for batch in found:
            classes = [key.split("/")[0] for key in batch.keys]
            assert batch.labels.tolist() == [["cat", "dog", "emu"].index(name) for name in classes]
            assert len(batch.images) == len(batch.keys)


def test_a_batch_of_bad_images_is_not_yielded(tmp_path: Path) -> None:
    root = spoil(write_classes(tmp_path / "root"))
    batches = make_loader(find_samples(root), SMALL, labels=None, batch_size=1, skip_bad_images=True)
    assert len(list(batches)) == 7
    assert len(batches) == 10


def test_nothing_but_bad_images(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_text("text")
    batches = make_loader(find_samples(tmp_path), SMALL, labels=None, batch_size=1, skip_bad_images=True)
    with pytest.raises(BadImageError, match=r"none of the 1 images could be read, for example 1\.jpg"):
        list(batches)


def test_a_file_that_vanished(tmp_path: Path) -> None:
    source = find_samples(write_classes(tmp_path / "root"))
    (tmp_path / "root" / "emu" / "2.jpg").unlink()
    batches = make_loader(source, SMALL, labels=None, batch_size=9)
    with pytest.raises(BadImageError, match=r"emu/2\.jpg: No such file or directory"):
        list(batches)


def test_real_imagenet_archive() -> None:
    path = shared_path("data/imagenet-val-650.tar")
    source = find_samples(path)
    labels = label_map(source, 1000)
    names = timm.data.ImageNetInfo().label_names()
    assert len(source) == 650
    assert all(names[label] == wnid for wnid, label in labels.items())
    sample = Sample("imagenet-val-650/n02510455/ILSVRC2012_val_00000657.JPEG", "n02510455")
    assert sample in source.samples
    assert labels["n02510455"] == 388  # the giant panda
    limited = source.limited(20)
    batches = make_loader(limited, SMALL, labels=labels, batch_size=7)
    found = torch.cat([batch.labels for batch in batches])
    assert found.tolist() == [labels[sample.class_name] for sample in limited.samples]
    assert len(set(found.tolist())) == 20
