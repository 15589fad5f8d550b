"""A small source and its training batches, for the tests of these."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cpvit.data import (
    Augmentation,
    ImageSource,
    Mixing,
    Preprocessing,
    TrainBatch,
    TrainBatches,
    TrainLoaderOptions,
    find_samples,
    label_map,
    make_loader,
    make_train_batches,
)

SMALL = Preprocessing(image_size=(24, 20), mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
PLAIN = Augmentation(random_resized_crop=False, flip=0.0)
EVERYTHING = Augmentation(rand_augment="rand-m9-n2-mstd0.5-inc1", scale=(0.3, 1.0), random_erasing=0.5)
# Forking is what is tested, and there may be more workers than cores.
WORKERS = pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create"
)
CLASSES, EACH = 3, 5


def batches_of(
    source: ImageSource,
    augmentation: Augmentation = EVERYTHING,
    mixing: Mixing = Mixing(),  # noqa: B008
    *,
    batch_size: int = 4,
    seed: int = 7,
    **options: float,
) -> TrainBatches:
    chosen = TrainLoaderOptions(batch_size, seed, augmentation, mixing, **options)  # type: ignore[arg-type]
    return make_train_batches(source, SMALL, chosen, labels=label_map(source, CLASSES), num_classes=CLASSES)


def take(batches: TrainBatches, count: int, start: int = 0) -> list[TrainBatch]:
    return list(islice(batches.starting_at(start), count))


def assert_same(first: TrainBatch, second: TrainBatch) -> None:
    assert first.step == second.step
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert (first.targets is None) == (second.targets is None)
    if first.targets is not None and second.targets is not None:
        assert torch.equal(first.targets, second.targets)


def identities(source: ImageSource, batches: Iterator[TrainBatch], count: int) -> list[int]:
    """Which image of the source each unaugmented image of the first `count` batches is."""
    plain = torch.cat([b.images for b in make_loader(source, SMALL, labels=None, batch_size=4)])
    found = torch.cat([batch.images for batch in islice(batches, count)])
    equal = (found[:, None] == plain[None]).flatten(2).all(2)
    assert (equal.sum(1) == 1).all()
    return equal.int().argmax(1).tolist()


def noise_source(folder: Path) -> ImageSource:
    """15 images of noise in 3 classes."""
    path = folder / "noise.tar"
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for name in ("ant", "bee", "cat"):
            for number in range(EACH):
                file = io.BytesIO()
                pixels = generator.integers(0, 256, (27, 31, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file, "PNG")
                member = tarfile.TarInfo(f"{name}/{number}.png")
                member.size = len(file.getvalue())
                archive.addfile(member, io.BytesIO(file.getvalue()))
    return find_samples(path)
