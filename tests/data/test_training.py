"""Training batches: addressable by position, alike for any number of workers and processes."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_batches import (
    CLASSES,
    EACH,
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
    BadImageError,
    ImageSource,
    Mixing,
    TrainLoaderOptions,
    find_samples,
    label_map,
    make_loader,
    make_train_batches,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    return noise_source(tmp_path_factory.mktemp("images"))


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_can_start_at_any_step(source: ImageSource, num_workers: int) -> None:
    mixing = Mixing(mixup=0.8, cutmix=1.0)
    whole = take(batches_of(source, mixing=mixing), 9)
    resumed = take(batches_of(source, mixing=mixing, num_workers=num_workers), 4, start=5)
    assert [batch.step for batch in whole] == list(range(9))
    for expected, found in zip(whole[5:], resumed, strict=True):
        assert_same(expected, found)


def test_batches_survive_the_way_to_a_worker(source: ImageSource) -> None:
    """Workers are not forked everywhere; where they are not, all they need is pickled."""
    batches = batches_of(source, mixing=Mixing(mixup=0.8))
    for expected, found in zip(take(batches, 2), take(pickle.loads(pickle.dumps(batches)), 2), strict=True):
        assert_same(expected, found)


def test_batches_differ_from_step_to_step_and_seed_to_seed(source: ImageSource) -> None:
    first, second = take(batches_of(source), 2)
    (other,) = take(batches_of(source, seed=8), 1)
    assert not torch.equal(first.images, second.images)
    assert not torch.equal(first.images, other.images)


def test_the_same_image_is_augmented_anew_each_epoch(source: ImageSource) -> None:
    single = ImageSource("one", source.classes, source.samples[:1], source.reader)
    images = [batch.images for batch in take(batches_of(single, batch_size=1), 6)]
    assert len({tuple(image.flatten().tolist()) for image in images}) == 6


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_see_one_large_batch(source: ImageSource, world_size: int) -> None:
    large = take(batches_of(source, batch_size=2 * world_size), 7)
    ranks = [
        take(batches_of(source, batch_size=2, rank=r, world_size=world_size), 7) for r in range(world_size)
    ]
    for step, expected in enumerate(large):
        assert torch.equal(torch.cat([batches[step].images for batches in ranks]), expected.images)
        assert torch.equal(torch.cat([batches[step].labels for batches in ranks]), expected.labels)


def test_processes_mix_differently(source: ImageSource) -> None:
    options = {"mixing": Mixing(mixup=1.0), "batch_size": 8, "world_size": 2}
    ratios = []
    for rank in (0, 1):
        (batch,) = take(batches_of(source, **options, rank=rank), 1)  # type: ignore[arg-type]
        assert batch.targets is not None
        mixed = batch.targets[(batch.targets > 0) & (batch.targets < 0.9999)]
        assert len(mixed) > 0
        ratios.append(mixed.max().item())
    assert ratios[0] != pytest.approx(ratios[1], abs=1e-4)


def test_an_epoch_has_each_image_once(source: ImageSource) -> None:
    batches = batches_of(source, PLAIN, batch_size=4)
    assert (batches.num_images, batches.steps_per_epoch) == (15, 4)
    seen = identities(source, batches.starting_at(0), 15)  # four epochs
    epochs = [seen[start : start + 15] for start in range(0, 60, 15)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_larger_than_the_data(source: ImageSource) -> None:
    batches = batches_of(source, PLAIN, batch_size=40)
    assert batches.steps_per_epoch == 1
    counts = Counter(identities(source, batches.starting_at(0), 1))
    assert sorted(counts) == list(range(15))
    assert set(counts.values()) <= {2, 3}


def test_labels_belong_to_the_images(source: ImageSource) -> None:
    batches = batches_of(source, PLAIN)
    labels = torch.cat([batch.labels for batch in take(batches, 5)]).tolist()
    assert labels == [index // EACH for index in identities(source, batches.starting_at(0), 5)]


@WORKERS
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_is_named(tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_text("not an image")
    batches = make_train_batches(
        find_samples(tmp_path),
        SMALL,
        TrainLoaderOptions(batch_size=1, augmentation=PLAIN, num_workers=num_workers),
        labels={"cat": 0},
        num_classes=1,
    )
    with pytest.raises(BadImageError) as caught:
        take(batches, 1)
    assert str(caught.value).startswith(f"cannot read image {tmp_path}/cat/1.png: ")
    assert str(caught.value).endswith("; repair or remove it")


def test_options_out_of_range(source: ImageSource) -> None:
    for options, message in (
        ({"seed": -1}, r"seed is -1 and num_workers 0; expected at least 0 for both"),
        ({"batch_size": 0}, r"batch_size is 0; expected at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank is 2 of world_size 2; expected 0 <= rank < world_size"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1\.0; expected a fraction below 1"),
        ({"mixing": Mixing(1.0), "batch_size": 3}, r"batch_size is 3, but mixing blends images in pairs"),
        (
            {"augmentation": Augmentation(rand_augment="rand-z9")},
            r"timm does not understand rand_augment 'rand-z9'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            batches_of(source, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"step is -1; expected at least 0"):
        batches_of(source).starting_at(-1)
    with pytest.raises(
        ValueError, match=r"class cat has label 2, but the head has 2 classes: expected labels from 0"
    ):
        make_train_batches(
            source, SMALL, TrainLoaderOptions(batch_size=2), labels=label_map(source, 3), num_classes=2
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, r"flip is 1\.5; expected a probability from 0 to 1"),
        ({"random_erasing": -0.1}, r"random_erasing is -0\.1; expected a probability"),
        (
            {"scale": (0.5, 0.2)},
            r"scale is \(0\.5, 0\.2\); expected two fractions of the image's area, in order",
        ),
        ({"color_jitter": -1.0}, r"color_jitter is -1\.0; expected a strength of at least 0"),
        (
            {"rand_augment": "original"},
            r"rand_augment is 'original'; expected timm's notation, such as 'rand-m9",
        ),
        (
            {"rand_augment": "rand-m9", "color_jitter": 0.3},
            r"color_jitter is 0\.3 beside rand_augment 'rand-m9', where timm leaves it out; set one of the two",
        ),
    ],
)
def test_augmentations_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)  # type: ignore[arg-type]


def test_mixing_that_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"mixup is -1; expected an alpha of at least 0 \(0 is off\)"):
        Mixing(mixup=-1)
    with pytest.raises(ValueError, match=r"switch_probability is 2; expected a probability from 0 to 1"):
        Mixing(switch_probability=2)


@pytest.mark.parametrize("world_size", [1, 2, 4, 20])
def test_processes_evaluate_each_image_once(source: ImageSource, world_size: int) -> None:
    options = {"labels": label_map(source, CLASSES), "batch_size": 4}
    shares = [
        make_loader(source, SMALL, **options, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    batches = [batch for share in shares for batch in share]
    alone = make_loader(source, SMALL, **options)
    assert [batch.keys for batch in batches] == [batch.keys for batch in alone], "the batches of one process"
    assert [key for batch in batches for key in batch.keys] == [sample.key for sample in source.samples]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0] * 5 + [1] * 5 + [2] * 5
    sizes = [share.num_images for share in shares]
    assert sum(sizes) == 15
    assert max(sizes) - min(sizes) <= 4, "one batch"


@WORKERS
def test_an_empty_share_with_workers(source: ImageSource) -> None:
    share = make_loader(source, SMALL, labels=None, batch_size=4, num_workers=2, rank=0, world_size=20)
    assert (share.num_images, len(share), list(share)) == (0, 0, [])


def test_a_share_of_bad_images_only_is_no_error(tmp_path: Path, source: ImageSource) -> None:
    (tmp_path / "1.jpg").write_text("text")
    Image.new("RGB", (9, 9)).save(tmp_path / "2.png")
    for rank, skipped in ((0, ["1.jpg"]), (1, [])):
        share = make_loader(
            find_samples(tmp_path),
            SMALL,
            labels=None,
            batch_size=1,
            skip_bad_images=True,
            rank=rank,
            world_size=2,
        )
        assert sum(len(batch.keys) for batch in share) == 1 - len(skipped)
        assert share.skipped == skipped
