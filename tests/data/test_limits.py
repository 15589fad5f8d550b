"""A sample of the images, and the rest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from listing import pairs, write_images

from cpvit.data import Sample, find_samples, split_samples


def listed(**counts: int) -> tuple[Sample, ...]:
    return tuple(Sample(f"{name}/{i:03d}", name) for name, count in counts.items() for i in range(count))


def test_limit_is_spread_over_classes() -> None:
    samples = listed(cat=20, dog=20, emu=2, fox=20)
    for count in range(1, 63):
        chosen, rest = split_samples(samples, count, seed=5)
        counts = Counter(sample.class_name for sample in chosen)
        large = [counts[name] for name in ("cat", "dog", "fox")]
        assert sum(counts.values()) == count
        assert max(large) - min(large) <= 1
        assert counts["emu"] == 2 or max(large) - counts["emu"] <= 1
        assert sorted([*chosen, *rest], key=lambda s: s.key) == list(samples)


def test_limit_depends_on_names_and_seed_only() -> None:
    samples = listed(cat=9, dog=11)
    chosen, _ = split_samples(samples, 6, seed=1)
    assert split_samples(reversed(samples), 6, seed=1)[0] == chosen
    assert split_samples(samples, 6, seed=2)[0] != chosen
    assert list(chosen) == sorted(chosen, key=lambda sample: sample.key)
    assert set(chosen) < set(split_samples(samples, 7, seed=1)[0])
    # Pinned: the sample of a published result must not change between versions.
    assert [sample.key for sample in chosen] == [
        "cat/000",
        "cat/002",
        "cat/005",
        "dog/000",
        "dog/002",
        "dog/004",
    ]


def test_limited_source(tmp_path: Path) -> None:
    source = find_samples(write_images(tmp_path, *(f"{name}/{i}.png" for name in "abc" for i in range(3))))
    limited = source.limited(2)
    assert len(limited) == 2
    assert limited.classes == ("a", "b", "c")
    assert source.limited(None) is source
    assert source.limited(99) is source
    with pytest.raises(ValueError, match="limit is 0; expected at least 1 image, or None for all 9"):
        source.limited(0)


def test_split_into_disjoint_parts(tmp_path: Path) -> None:
    source = find_samples(write_images(tmp_path, *(f"{name}/{i}.png" for name in "abc" for i in range(3))))
    chosen, rest = source.split(6, seed=4)
    assert Counter(sample.class_name for sample in chosen.samples) == {"a": 2, "b": 2, "c": 2}
    assert sorted(pairs(chosen) + pairs(rest)) == pairs(source)
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"cannot take {count} of the 9 images .* between 1 and 8"):
            source.split(count)
