"""Runs that are killed, and runs that many processes share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("finetuning_processes.py")


def outcome_of(what: str, folder: Path) -> Any:
    places = os.pathsep.join(
        [str(SCRIPT.parent), str(SCRIPT.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    result = subprocess.run(
        [sys.executable, str(SCRIPT), what, str(folder)],
        env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "outcome.json").read_text())


def test_a_run_killed_at_random_moments_is_the_run_that_was_not(tmp_path: Path) -> None:
    found = outcome_of("kill", tmp_path)
    killed, whole = found["killed"], found["whole"]
    assert killed["kills"] >= 4
    assert killed["loss"] == whole["loss"]
    assert killed["grad_norm"] == whole["grad_norm"]
    assert killed["evaluations"] == whole["evaluations"]
    for name in ("best", "last"):
        one, other = (load_file(tmp_path / run / name / "model.safetensors") for run in ("killed", "whole"))
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert not list((tmp_path / "killed").rglob(".*")), "nothing half-written is left"


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    found = outcome_of("distributed", tmp_path)
    alone = found["alone"]
    for rank in ("rank0", "rank1"):
        assert found[rank]["processes"] == 2
        for name in ("loss", "grad_norm"):
            assert found[rank][name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6)
        for shared, single in zip(found[rank]["evaluations"], alone["evaluations"], strict=True):
            assert shared == pytest.approx(single, rel=1e-4)
            assert shared["images"] == 18, "every image counts once"
    assert found["rank0"]["loss"] == found["rank1"]["loss"]
    for run in found.values():
        # Eight images a step, however many processes share them.
        assert sum(8 / speed for speed in run["images_per_s"]) == pytest.approx(run["seconds"])
    one, other = (load_file(tmp_path / run / "last/model.safetensors") for run in ("run", "alone"))
    for key in other:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-5)
