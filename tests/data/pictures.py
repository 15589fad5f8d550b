"""Images of noise, encoded and in class folders, for the tests of decoding and loading."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cpvit.data import (
    Batch,
    Preprocessing,
)

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
