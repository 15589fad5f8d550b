"""Evaluation, sweep and search by two processes: the figures of one, every image once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from cpvit import Plan
from cpvit.commands.cli import main
from cpvit.tuning.escalate import Stage

MODEL = ["--model", "vit_tiny_patch16_224", "--image-size", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, tiny_tar: Path) -> list[str]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3, depth=12)
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), file)
    return [*MODEL, "--checkpoint", str(file), "--data", str(tiny_tar), "--batch-size", "4"]


def two_processes(arguments: list[str]) -> str:
    """What ``torchrun`` prints for a command line of cpvit."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code = "from cpvit.commands.cli import entry_point; entry_point()"
    script = Path(arguments[-1]).with_suffix(".py")
    script.write_text(code)
    done = subprocess.run([*run, str(script), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def record(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_an_evaluation_is_that_of_one_process(common: list[str], tmp_path: Path) -> None:
    arguments = ["eval", *common, "--macs", "0.7", "--json"]
    assert main([*arguments, str(tmp_path / "one.json")]) == 0
    printed = two_processes([*arguments, str(tmp_path / "two.json")])
    assert printed.count("12 images") == 1, "only the first process prints"
    one, two = (record(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert two["images"] == one["images"] == 12
    for side in ("dense", "pruned"):
        assert two[side] == one[side]
    assert two["agreement"] == one["agreement"]
    assert two["kl"] == one["kl"], "to the last digit"


def test_an_exported_file_is_evaluated_as_by_one_process(common: list[str], tmp_path: Path) -> None:
    out, images = str(tmp_path / "tiny.pt2"), common.index("--data")
    assert main(["export", *common[:images], "--macs", "0.7", "--to", "torch", "--out", out]) == 0
    arguments = ["eval", "--exported", out, *common, "--workers", "1", "--json"]
    assert main([*arguments, str(tmp_path / "one.json")]) == 0
    printed = two_processes([*arguments, str(tmp_path / "two.json")])
    assert printed.count("12 images") == 1, "only the first process prints"
    one, two = (record(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one["images"] == 12
    assert {name: one[name] for name in ("images", "top1", "top5", "dense")} == {
        name: two[name] for name in ("images", "top1", "top5", "dense")
    }


def test_a_search_finds_the_plan_of_one_process(common: list[str], tmp_path: Path) -> None:
    arguments = ["plan", *common, "--macs", "0.7", "--trials", "4", "--out"]
    assert main([*arguments, str(tmp_path / "one.json")]) == 0
    two_processes([*arguments, str(tmp_path / "two.json")])
    assert record(tmp_path / "two.json") == record(tmp_path / "one.json")


def test_two_stages_are_planned_evaluated_and_timed(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "agreement", property(lambda self: 0.0))  # no plan alone will do
    monkeypatch.setattr(
        "cpvit.tuning.escalate.margins_for", lambda stages, images, wanted: [0.2] * len(stages)
    )
    plan = str(tmp_path / "pair.json")
    assert main(["plan", *common, "--min-agreement", "0.9", "--escalate", "--out", plan]) == 0
    assert "the dense model again for the" in capsys.readouterr().out
    assert record(Path(plan))["margin"] == 0.2

    arguments = ["eval", *common, "--plan", plan, "--json"]
    assert main([*arguments, str(tmp_path / "one.json")]) == 0
    assert "of the images ran again (dense)" in capsys.readouterr().out
    two_processes([*arguments, str(tmp_path / "two.json")])
    one, two = (record(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one["escalation"] == two["escalation"]
    assert 0 < one["escalation"]["share"] <= 1
    assert one["macs_ratio"] == two["macs_ratio"] > one["plan"]["macs_ratio"]

    timed = ["benchmark", *MODEL, "--batch-size", "4", "--seconds", "0", "--plan", plan]
    assert main([*timed, "--methods", "tome", "--macs", "0.7"]) == 0
    assert "plan (cpvit-merge)" in capsys.readouterr().out


def test_one_plan_is_written_where_it_is_cheaper(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "agreement", property(lambda self: 1.0))
    monkeypatch.setattr(
        "cpvit.tuning.escalate.margins_for", lambda stages, images, wanted: [1.0] * len(stages)
    )
    plan = str(tmp_path / "plan.json")
    assert main(["plan", *common, "--min-agreement", "0.9", "--escalate", "--out", plan]) == 0
    assert "one plan is cheaper than two stages here" in capsys.readouterr().out
    assert Plan.load(plan).macs_ratio == pytest.approx(0.4, abs=0.005)


@pytest.mark.parametrize("extra", [["--align", "8"], ["--head-keep-rate", "0.5"]])
def test_options_that_two_stages_do_not_have_are_refused(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    command = ["plan", *common, "--min-agreement", "0.9", "--escalate", *extra]
    assert main([*command, "--out", str(tmp_path / "pair.json")]) == 1
    assert "--escalate cuts no heads and aligns nothing" in capsys.readouterr().err


def test_escalating_needs_an_agreement_to_hold(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "pair.json")
    assert main(["plan", *common, "--macs", "0.6", "--escalate", "--out", out]) == 1
    assert "--escalate goes with --min-agreement" in capsys.readouterr().err
