"""Decoding: every mode becomes RGB, and bad data is named with its cause."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, noise
from PIL import Image, ImageFile

from cpvit.data import BadImageError, images
from cpvit.data.folders import FolderReader
from cpvit.data.images import decode


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


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "PDF", "IM", "SGI"])
def test_what_a_name_hides_is_not_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called; rare decoders are the ones that break."""
    monkeypatch.setattr(subprocess, "check_call", None)
    with pytest.raises(
        BadImageError, match=r"x\.jpg: Pillow does not .* that is read \((AVIF, )?BMP, GIF, JPEG, .*WEBP\);"
    ):
        decode(encoded(noise(2), kind), "x.jpg")


@pytest.mark.parametrize("kind", ["JPEG2000", "MPO", "PPM", "TIFF", "BMP"])
def test_other_formats_that_photographs_come_in(kind: str) -> None:
    assert decode(encoded(noise(2), kind), "x").size == (23, 17)


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


def test_threads_that_decode_at_once_do_not_undo_each_others_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's switch and Python's filters are the process's: whoever is done first must not put them back."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    filters = list(warnings.filters)
    first_inside, second_inside, first_done = threading.Event(), threading.Event(), threading.Event()
    to_rgb, said = images._to_rgb, []

    def held(image: Image.Image) -> Image.Image:
        mine, others = (first_inside, second_inside) if image.width == 17 else (second_inside, first_done)
        mine.set()
        assert others.wait(60)
        return to_rgb(image)

    def read_truncated() -> None:
        try:
            decode(encoded(Image.new("RGB", (64, 64), "red").rotate(30))[:-100], "second.jpg")
        except BadImageError as error:
            said.append(str(error))

    monkeypatch.setattr(images, "_to_rgb", held)
    first = threading.Thread(target=decode, args=(encoded(Image.new("RGB", (17, 17))), "first.jpg"))
    second = threading.Thread(target=read_truncated)
    first.start()
    assert first_inside.wait(60)
    second.start()
    first.join()
    first_done.set()
    second.join()
    assert ["truncated" in message for message in said] == [True]
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert list(warnings.filters) == filters


@pytest.mark.parametrize("limit", [300, 100])
def test_decompression_bombs(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    # 391 pixels: above 300 Pillow warns, above twice 100 it raises.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadImageError, match=r"bomb\.jpg: Image size \(391 pixels\) exceeds limit"):
        decode(encoded(noise(1)), "bomb.jpg")


def test_a_machine_without_open_files_is_no_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wrong with the image: it must not be skipped."""

    def fail(path: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match=r"cannot read image .*a\.png: Too many open files"):
        FolderReader(tmp_path).read("a.png")
