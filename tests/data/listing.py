"""Small images in folders and archives, for the tests of listing them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image

from cpvit.data import ImageSource


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
