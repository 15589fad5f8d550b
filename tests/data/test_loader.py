"""Decoding, preprocessing, batches, and what happens to files that are no images."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFile
from torchvision.datasets import ImageFolder

from cpvit.data import (
    BadImageError,
    Batch,
    ImageSource,
    Preprocessing,
    Sample,
    find_samples,
    label_map,
    make_loader,
)
from cpvit.data.images import decode

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
SMALL = Preprocessing(image_size=(13, 11), mean=(0.5,) * 3, std=(0.25,) * 3)
WORKERS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int, size: tuple[int, int] = (23, 17)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_classes(root: Path, *, classes: Iterable[str] = ("cat", "dog", "emu"), each: int = 3) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(each):
            (root / name / f"{index}.jpg").write_bytes(encoded(noise(10 * number + index)))
    return root


def pack(root: Path, archive: Path, mode: str = "w") -> Path:
    with tarfile.open(archive, mode) as tar:
        tar.add(root, arcname=root.name)
    return archive


def images_of(batches: Iterable[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


# --- decoding ---


def test_every_mode_becomes_rgb() -> None:
    rgb = noise(1)
    palette_with_alpha = encoded(rgb.convert("P"), "PNG", transparency=bytes(range(256)))
    files = {
        "palette": encoded(rgb.convert("P"), "PNG"),
        "palette with alpha": palette_with_alpha,
        "cmyk": encoded(rgb.convert("CMYK")),
        "grey": encoded(rgb.convert("L")),
        "bilevel": encoded(rgb.convert("1"), "PNG"),
        "alpha": encoded(rgb.convert("RGBA"), "PNG"),
        "gif": encoded(rgb, "GIF"),
        "webp": encoded(rgb, "WEBP"),
    }
    for name, data in files.items():
        image = decode(data, name)
        assert (image.mode, image.size) == ("RGB", (23, 17))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(values), "PNG")
    assert np.asarray(decode(data, "deep.png"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(noise(1), exif=exif), "turned.jpg").size == (23, 17)


def test_damaged_exif_is_harmless() -> None:
    data = encoded(noise(1), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert decode(data, "x.jpg").size == (23, 17)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "the file is empty"),
        (b"just text, named .jpg", "Pillow does not recognise it as an image"),
        (encoded(noise(1))[:-200], "truncated"),
        (encoded(noise(1), "PNG")[:-300], "truncated"),
        (encoded(noise(1))[:2], "Pillow does not recognise"),
        (encoded(noise(1), "PNG")[:20], ""),
    ],
)
def test_bad_data_is_named_with_its_cause(data: bytes, cause: str) -> None:
    with pytest.raises(
        BadImageError, match=rf"cannot read image x\.jpg: .*{cause}.*; repair or remove it, or leave"
    ):
        decode(data, "x.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_any_damage_gives_an_image_or_the_error(kind: str) -> None:
    rng = np.random.default_rng(0)
    whole = encoded(noise(3), kind)
    for _ in range(40):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        data[rng.integers(len(data))] ^= 0xFF
        try:
            assert decode(bytes(data), "x").mode == "RGB"
        except BadImageError as error:
            assert "cannot read image x: " in str(error)  # noqa: PT017 (either outcome is right)


def test_truncated_files_fail_even_if_pillow_was_told_to_accept_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadImageError, match="truncated"):
        decode(encoded(noise(1))[:-200], "x.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("limit", [300, 100])
def test_decompression_bombs(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    # 391 pixels: above 300 Pillow warns, above twice 100 it raises.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadImageError, match=r"bomb\.jpg: Image size \(391 pixels\) exceeds limit"):
        decode(encoded(noise(1)), "bomb.jpg")


# --- preprocessing ---


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "test_vit"])
def test_preprocessing_is_timms_own(name: str) -> None:
    model = timm.create_model(name)
    config = timm.data.resolve_model_data_config(model)
    image = noise(5, (301, 207))
    expected = timm.data.create_transform(**config, is_training=False)(image)
    assert torch.equal(Preprocessing.from_model(model).transform()(image), expected)


def test_preprocessing_follows_the_size_of_the_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 80))
    preprocessing = Preprocessing.from_model(model)
    assert preprocessing.image_size == (48, 80)
    assert preprocessing.transform()(noise(1)).shape == (3, 48, 80)


def test_preprocessing_overrides() -> None:
    model = timm.create_model("test_vit", dynamic_img_size=True)
    changed = Preprocessing.from_model(
        model, image_size=64, mean=(0.5,) * 3, std=[0.5] * 3, interpolation="bilinear", crop_pct=1
    )
    assert changed == Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "center")
    white = changed.transform()(Image.new("RGB", (64, 64), "white"))
    assert torch.equal(white, torch.ones(3, 64, 64))


def test_preprocessing_survives_json() -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL


def test_preprocessing_refuses_a_size_the_model_does_not_take() -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    with pytest.raises(
        ValueError, match=r"image_size is \(64, 64\) but the model takes \(224, 224\) only; create it"
    ):
        Preprocessing.from_model(model, image_size=64)


def test_preprocessing_of_an_unknown_model() -> None:
    with pytest.raises(ValueError, match="Linear has no pretrained_cfg, so its preprocessing is unknown"):
        Preprocessing.from_model(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": [0, 5]}, r"image_size is \(0, 5\); expected height and width, both at least 1"),
        ({"image_size": [1, 2, 3]}, r"image_size is \(1, 2, 3\); expected one number"),
        ({"mean": [0.5]}, "expected three values each"),
        ({"std": [1, 1, 0]}, "std above 0"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; expected one of nearest, bilinear"),
        ({"crop_pct": 0}, "crop_pct is 0; expected a fraction above 0"),
        ({"crop_mode": "left"}, "crop_mode is 'left'; expected one of center, squash, border"),
    ],
)
def test_preprocessing_refuses_nonsense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict({**SMALL.to_dict(), **changes})


# --- batches ---


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


# --- bad images ---


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


# --- real data ---


def test_real_imagenet_archive() -> None:
    path = SHARED_DATA / "imagenet-val-650.tar"
    if not path.exists():
        # Not an assert: pytest would print the whole environment when it fails.
        if os.environ.get("CI") == "true":
            pytest.fail(f"{path} is missing")
        pytest.skip(f"{path} is missing")
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
