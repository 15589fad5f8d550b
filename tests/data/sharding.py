"""Small shards whose images say which they are, for the tests of shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cpvit.data import (
    Augmentation,
    ImageSource,
    Preprocessing,
    TrainBatch,
    TrainBatches,
    TrainLoaderOptions,
    label_map,
    make_train_batches,
)

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


def batches_of(source: ImageSource, **options: Any) -> TrainBatches:
    chosen = {"batch_size": 4, "seed": 3, "augmentation": PLAIN, "shuffle_buffer": 6, **options}
    return make_train_batches(
        source, SMALL, TrainLoaderOptions(**chosen), labels=label_map(source, CLASSES), num_classes=CLASSES
    )


def take(batches: TrainBatches, count: int, start: int = 0) -> list[TrainBatch]:
    return list(islice(batches.starting_at(start), count))


def labels_of(batches: Sequence[TrainBatch]) -> list[int]:
    return torch.cat([batch.labels for batch in batches]).tolist()
