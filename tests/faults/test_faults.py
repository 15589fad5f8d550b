"""A short run of every campaign; ``python -m tests.faults`` is the long one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cpvit import Plan
from cpvit.commands.cli import USER_ERRORS
from cpvit.data import Preprocessing, find_samples, make_loader
from cpvit.weights.loading import load_checkpoint
from tests.faults import properties
from tests.faults.campaign import run
from tests.faults.fuzzing import climbing_tar, fuzzers, hostile_files, model


def test_properties_hold_for_random_models() -> None:
    tally = run("properties", properties.case, range(25))
    assert not tally.failures, tally.summary()
    assert tally.outcomes["held"] > 12


@pytest.mark.parametrize("kind", fuzzers())
def test_damaged_files_are_read_or_refused(kind: str) -> None:
    tally = run(kind, fuzzers()[kind], range(60))
    assert not tally.failures, tally.summary()


def read(path: Path) -> None:
    if path.suffix == ".json":
        Plan.load(path)
    elif path.suffix == ".tar":
        preprocessing = Preprocessing((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        for _ in make_loader(find_samples(path), preprocessing, labels=None, batch_size=2):
            pass
    else:
        load_checkpoint(model(), path)


@pytest.mark.parametrize("name", hostile_files(Path("trap")))
def test_hostile_files_are_refused_and_do_no_harm(name: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = tmp_path / name
    path.write_bytes(hostile_files(trap)[name])
    before = {key: value.clone() for key, value in model().state_dict().items()}
    with pytest.raises(USER_ERRORS) as refused:
        read(path)
    assert name in str(refused.value)
    assert not trap.exists()
    assert all(torch.equal(before[key], value) for key, value in model().state_dict().items())


def test_an_archive_that_climbs_out_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "one" / "two"
    folder.mkdir(parents=True)
    target = tmp_path / "target"
    (folder / "climbing.tar").write_bytes(climbing_tar(target))
    read(folder / "climbing.tar")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["climbing.tar", "one", "two"]


def test_a_failure_is_counted_with_its_seed() -> None:
    def case(seed: int) -> str:
        assert seed != 3, "three is refused"
        return "held"

    tally = run("some", case, range(5))
    assert tally.outcomes["held"] == 4
    assert [seed for seed, _ in tally.failures] == [3]
    assert "5 cases, 1 failed" in tally.summary()
    assert "three is refused" in tally.summary()


def test_a_property_that_does_not_hold_is_found(monkeypatch: Any) -> None:
    monkeypatch.setattr(properties, "close", lambda one, other: False)
    assert run("properties", properties.case, range(2)).failures
