"""What happens to a training image, and between the images of a batch."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_batches import (
    CLASSES,
    PLAIN,
    SMALL,
    WORKERS,
    assert_same,
    batches_of,
    identities,
    noise_source,
    take,
)

from cpvit.data import (
    Augmentation,
    ImageSource,
    Mixing,
    TrainLoaderOptions,
    find_samples,
    make_train_batches,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    return noise_source(tmp_path_factory.mktemp("images"))


def test_without_augmentation_images_are_those_of_evaluation(source: ImageSource) -> None:
    seen = identities(source, batches_of(source, PLAIN).starting_at(0), 4)
    assert len(set(seen[:15])) == 15


def test_flip_alone(source: ImageSource) -> None:
    plain = take(batches_of(source, PLAIN), 4)
    flipped = take(batches_of(source, Augmentation(random_resized_crop=False, flip=1.0)), 4)
    for before, after in zip(plain, flipped, strict=True):
        # The crop is even, so that flipping before and after it is the same.
        assert torch.equal(before.images.flip(3), after.images)


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(flip=0.0, scale=(0.2, 0.5)),
        Augmentation(random_resized_crop=False, flip=0.5),
        Augmentation(random_resized_crop=False, flip=0.0, color_jitter=0.4),
        Augmentation(random_resized_crop=False, flip=0.0, random_erasing=0.9),
        Augmentation(random_resized_crop=False, flip=0.0, rand_augment="rand-m9-mstd0.5-inc1"),
    ],
)
def test_each_augmentation_acts(source: ImageSource, augmentation: Augmentation) -> None:
    plain = take(batches_of(source, PLAIN), 4)
    changed = take(batches_of(source, augmentation), 4)
    for before, after in zip(plain, changed, strict=True):
        assert torch.equal(before.labels, after.labels)
        assert (before.images.shape, after.images.dtype) == (after.images.shape, torch.float32)
    assert any(not torch.equal(a.images, b.images) for a, b in zip(plain, changed, strict=True))


def test_the_strongest_augmentation_runs_with_every_pillow() -> None:
    """Posterize keeps 0 bits then, which Pillow 13 refuses."""
    strongest = Augmentation(random_resized_crop=False, rand_augment="rand-m10-n15-p1.0-inc1").transform(
        SMALL
    )
    image = Image.new("RGB", (30, 30), (51, 102, 204))
    for seed in range(20):
        random.seed(seed)
        np.random.seed(seed)
        assert strongest(image).shape == (3, *SMALL.image_size)


def test_images_are_normalised(tmp_path: Path) -> None:
    (tmp_path / "grey").mkdir()
    Image.new("RGB", (30, 30), (51, 102, 204)).save(tmp_path / "grey" / "1.png")
    batches = make_train_batches(
        find_samples(tmp_path), SMALL, TrainLoaderOptions(batch_size=1), labels={"grey": 0}, num_classes=1
    )
    (batch,) = take(batches, 1)
    expected = (torch.tensor([0.2, 0.4, 0.8]) - torch.tensor(SMALL.mean)) / torch.tensor(SMALL.std)
    torch.testing.assert_close(batch.images[0], expected[:, None, None].expand(3, 24, 20))


def state() -> list[object]:
    kind, words, *rest = np.random.get_state()
    return [random.getstate(), kind, words.tolist(), rest, torch.get_rng_state().tolist()]


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generators_are_left_alone(source: ImageSource, num_workers: int) -> None:
    batches = batches_of(source, mixing=Mixing(mixup=1.0, cutmix=1.0), num_workers=num_workers)
    before = state()
    expected = take(batches, 3)
    assert state() == before
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    for first, second in zip(expected, take(batches, 3), strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(mixup=0.8, cutmix=1.0)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_mixed_targets_sum_to_one(source: ImageSource, mixing: Mixing, label_smoothing: float) -> None:
    for batch in take(batches_of(source, mixing=mixing, label_smoothing=label_smoothing), 6):
        assert batch.targets is not None
        assert batch.targets.shape == (4, CLASSES)
        assert batch.targets.dtype == torch.float32
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(4))
        least = label_smoothing / CLASSES
        for target, label, partner in zip(batch.targets, batch.labels, batch.labels.flip(0), strict=True):
            others = [index for index in range(CLASSES) if index not in (int(label), int(partner))]
            torch.testing.assert_close(target[others], torch.full((len(others),), least))


def test_mixup_blends_images_as_it_blends_targets(source: ImageSource) -> None:
    plain = take(batches_of(source, PLAIN), 8)
    mixed = take(batches_of(source, PLAIN, Mixing(mixup=1.0)), 8)
    told = 0
    for before, after in zip(plain, mixed, strict=True):
        assert after.targets is not None
        if before.labels[0] == before.labels[-1]:
            continue  # the targets then do not tell the ratio
        told += 1
        ratio = after.targets[0, before.labels[0]]
        torch.testing.assert_close(after.images, ratio * before.images + (1 - ratio) * before.images.flip(0))
    assert told > 2


def test_no_targets_without_mixing_and_smoothing(source: ImageSource) -> None:
    assert all(batch.targets is None for batch in take(batches_of(source), 2))
    assert all(
        batch.targets is None for batch in take(batches_of(source, mixing=Mixing(1.0, probability=0)), 2)
    )


def test_label_smoothing_alone(source: ImageSource) -> None:
    for batch in take(batches_of(source, label_smoothing=0.3), 2):
        expected = torch.full((4, CLASSES), 0.1).scatter_(1, batch.labels[:, None], 0.8)
        assert batch.targets is not None
        torch.testing.assert_close(batch.targets, expected)
