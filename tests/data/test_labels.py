"""Class folders to outputs of the head."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpvit.data import ImageSource, Sample, label_map
from cpvit.data.cifar import CIFAR10_CLASSES
from cpvit.data.folders import FolderReader


def source_of(*classes: str) -> ImageSource:
    reader = FolderReader(Path())
    samples = tuple(Sample(f"{name}/1.png", name) for name in classes)
    return ImageSource("photos", tuple(sorted(classes)), samples or (Sample("1.png", None),), reader)


def test_a_subset_of_imagenet_gets_the_labels_of_the_head() -> None:
    labels = label_map(source_of("n15075141", "n02119789", "n01440764"), 1000)
    assert labels == {"n01440764": 0, "n02119789": 278, "n15075141": 999}


def test_imagenet_21k_heads() -> None:
    from timm.data import ImageNetInfo

    for num_classes, variant in (
        (11821, "imagenet-12k"),
        (21841, "imagenet-22k"),
        (21843, "imagenet-21k-goog"),
    ):
        names = ImageNetInfo(variant).label_names()
        labels = label_map(source_of(names[7], names[5000]), num_classes)
        assert labels == {names[7]: 7, names[5000]: 5000}


def test_unknown_wordnet_id() -> None:
    with pytest.raises(
        ValueError,
        match=r"photos has 1 WordNet ids unknown to imagenet-1k with 1000 classes \(n99999999\); use a",
    ):
        label_map(source_of("n01440764", "n99999999"), 1000)


def test_wordnet_folders_for_a_fine_tuned_head_count_in_order() -> None:
    assert label_map(source_of("n02119789", "n01440764"), 2) == {"n01440764": 0, "n02119789": 1}


def test_one_other_folder_makes_it_an_ordinary_data_set() -> None:
    with pytest.raises(
        ValueError, match=r"2 class folders \(background, n01440764\), the model has 1000 classes"
    ):
        label_map(source_of("n01440764", "background"), 1000)


def test_sorted_names() -> None:
    assert label_map(source_of("dog", "cat", "emu"), 3) == {"cat": 0, "dog": 1, "emu": 2}


def test_cifar10_order_is_alphabetical() -> None:
    assert list(label_map(source_of(*reversed(CIFAR10_CLASSES)), 10)) == list(CIFAR10_CLASSES)


def test_wrong_number_of_classes() -> None:
    with pytest.raises(
        ValueError,
        match=r"photos has 4 class folders \(a, b, c, \.\.\.\), the model has 10 classes; use the data",
    ):
        label_map(source_of("a", "b", "c", "d"), 10)


def test_no_classes() -> None:
    with pytest.raises(ValueError, match=r"photos has no class folders; .* got images such as 1\.png"):
        label_map(source_of(), 10)


def test_no_classifier() -> None:
    with pytest.raises(ValueError, match=r"the model has no classifier \(num_classes is 0\)"):
        label_map(source_of("a"), 0)


def test_numbers_whose_order_is_ambiguous() -> None:
    with pytest.raises(
        ValueError, match=r"\(0, 1, 10, \.\.\.\) is not their order by value; give them leading zeros"
    ):
        label_map(source_of(*map(str, range(11))), 11)
    assert label_map(source_of(*map(str, range(10))), 10)["7"] == 7
    assert label_map(source_of(*(f"{i:02d}" for i in range(11))), 11)["10"] == 10
