"""``cpvit plan``, ``--plan`` and ``cpvit sweep`` on a tiny model and a tiny archive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from conftest import randomize_
from PIL import Image
from safetensors.torch import save_file

from cpvit.cli import main
from cpvit.plan import Plan


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, tiny_tar: Path) -> list[str]:
    model = timm.create_model("test_vit", num_classes=3)
    randomize_(model, 0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return ["--model", "test_vit", "--checkpoint", str(path), "--data", str(tiny_tar), "--device", "cpu"]


def test_a_plan_is_made_and_then_applied(common: list[str], tmp_path: Path, capsys: Any) -> None:
    out, record = tmp_path / "plan.json", tmp_path / "record.json"
    made = [
        "plan",
        *common,
        "--limit",
        "6",
        "--macs",
        "0.6",
        "--trials",
        "6",
        "--align",
        "none",
        "--out",
        str(out),
    ]
    assert main(made) == 0
    assert "6 schedules judged" in capsys.readouterr().out
    plan = Plan.load(out)
    assert (plan.method, plan.schedule, plan.calibration_images) == ("cpvit-merge", "search", 6)
    assert main(["eval", *common, "--leave-out", "6", "--plan", str(out), "--json", str(record)]) == 0
    result = json.loads(record.read_text())
    assert result["images"] == 6, "the images the plan was made on are left out"
    assert result["pruned"]["tokens_per_block"] == list(plan.tokens_per_block)
    assert result["macs_ratio"] == pytest.approx(0.6, rel=0.005)


def test_a_plan_and_a_dial_do_not_go_together(common: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main(["eval", *common, "--macs", "0.6", "--plan", str(tmp_path / "plan.json")]) == 1
    assert "--plan holds the method and every count" in capsys.readouterr().err


def test_a_sweep_has_a_row_and_a_record_for_every_point_and_draws_them(
    common: list[str], tmp_path: Path, capsys: Any
) -> None:
    record, plot = tmp_path / "sweep.json", tmp_path / "sweep.png"
    asked = ["--methods", "cpvit,tome,random", "--macs", "0.8,0.6"]
    assert main(["sweep", *common, *asked, "--json", str(record), "--plot", str(plot)]) == 0
    points = json.loads(record.read_text())["points"]
    expected = [(method, macs) for method in ("cpvit", "tome", "random") for macs in (0.8, 0.6)]
    assert [(point["method"], point["macs"]) for point in points] == expected
    assert all(point["macs_ratio"] == pytest.approx(point["macs"], rel=0.005) for point in points)
    assert capsys.readouterr().out.count("\n") == 2 + len(expected)
    with Image.open(plot) as picture:
        assert picture.size[0] > 800


def test_a_searched_sweep_needs_images_of_its_own(common: list[str], capsys: Any) -> None:
    assert main(["sweep", *common, "--searched", "cpvit"]) == 1
    assert "--searched needs images that are not evaluated: give --calibration" in capsys.readouterr().err


def test_a_list_of_numbers_that_is_none_is_refused(common: list[str], capsys: Any) -> None:
    assert main(["sweep", *common, "--macs", "0.6;0.5"]) == 1
    assert "expected numbers separated by commas, got '0.6;0.5'" in capsys.readouterr().err
