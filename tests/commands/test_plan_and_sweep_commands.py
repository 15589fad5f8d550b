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

from cpvit.commands.cli import main
from cpvit.machine.environment import describe_environment
from cpvit.measure.timings import Speedup
from cpvit.plans.plan import Plan
from cpvit.tuning.speedup import SpeedTuned, SpeedupOptions
from cpvit.tuning.target import Target
from cpvit.tuning.tune import TuneOptions, tune


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, tiny_tar: Path) -> list[str]:
    model = timm.create_model("test_vit", num_classes=3)
    randomize_(model, 0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return ["--model", "test_vit", "--checkpoint", str(path), "--data", str(tiny_tar), "--device", "cpu"]


def test_a_plan_is_made_and_then_applied(common: list[str], tmp_path: Path, capsys: Any) -> None:
    out, record = tmp_path / "plan.json", tmp_path / "record.json"
    made = ["plan", *common, "--limit", "6", "--macs", "0.6", "--trials", "6", "--out", str(out)]
    assert main([*made, "--align", "none"]) == 0
    assert "6 schedules evaluated" in capsys.readouterr().out
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


def test_a_sweep_compares_methods_on_the_same_schedule(common: list[str], tmp_path: Path) -> None:
    record = tmp_path / "sweep.json"
    asked = ["--methods", "cpvit-merge,tome,tome:curve", "--macs", "0.6"]
    assert main(["sweep", *common, *asked, "--json", str(record)]) == 0
    merge, tome, same = json.loads(record.read_text())["points"]
    assert [point["schedule"] for point in (merge, tome, same)] == ["curve", "constant", "curve"]
    assert same["method"] == "tome:curve"
    counts = [point["plan"]["patches_per_block"] for point in (merge, tome, same)]
    # Not quite the same: ToMe can merge at most half of a block's tokens, and its matching costs less.
    assert _distance(counts[0], counts[2]) < _distance(counts[0], counts[1]) / 3


def _distance(counts: list[int], others: list[int]) -> int:
    return sum(abs(count - other) for count, other in zip(counts, others, strict=True))


def test_a_sweep_refuses_an_unknown_schedule_before_it_runs(
    common: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpvit.measure.sweep.predict", lambda *_, **__: pytest.fail("ran"))
    assert main(["sweep", *common, "--methods", "tome:gentle"]) == 1
    assert "schedule must be one of auto, curve" in capsys.readouterr().err


def test_a_searched_sweep_needs_images_of_its_own(common: list[str], capsys: Any) -> None:
    assert main(["sweep", *common, "--searched", "cpvit"]) == 1
    assert "--searched needs images that are not evaluated: give --calibration" in capsys.readouterr().err


def test_a_list_of_numbers_that_is_none_is_refused(common: list[str], capsys: Any) -> None:
    assert main(["sweep", *common, "--macs", "0.6;0.5"]) == 1
    assert "expected numbers separated by commas, got '0.6;0.5'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def plan_file(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plans") / "plan.json"
    made = ["plan", *common, "--limit", "6", "--macs", "0.6", "--trials", "3", "--align", "8"]
    assert main([*made, "--out", str(out)]) == 0
    return out


def test_an_aligned_plan_says_so_and_is(plan_file: Path) -> None:
    plan = Plan.load(plan_file)
    assert plan.align == 8
    assert all(tokens % 8 == 0 or tokens == 101 for tokens in plan.tokens_per_block[:-1])
    assert plan.macs_ratio == pytest.approx(0.6, rel=0.01)


def test_a_sweep_takes_plans_as_a_line_of_their_own(
    common: list[str], plan_file: Path, tmp_path: Path, capsys: Any
) -> None:
    record, plot = tmp_path / "sweep.json", tmp_path / "sweep.png"
    asked = ["--methods", "tome", "--macs", "0.6", "--plans", f"{plan_file},{plan_file}"]
    assert main(["sweep", *common, *asked, "--json", str(record), "--plot", str(plot)]) == 0
    points = json.loads(record.read_text())["points"]
    assert [point["method"] for point in points] == ["tome", "plan (cpvit-merge)", "plan (cpvit-merge)"]
    assert points[1]["plan"]["patches_per_block"] == list(Plan.load(plan_file).patches_per_block)
    assert points[1]["kl"] == points[2]["kl"]
    assert capsys.readouterr().out.count("plan (cpvit-merge)") == 2
    assert plot.is_file()


def test_a_sweep_refuses_the_plan_of_another_model_before_it_runs(
    common: list[str], plan_file: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpvit.measure.sweep.predict", lambda *_, **__: pytest.fail("ran"))
    other = tmp_path / "other.json"
    other.write_text(plan_file.read_text().replace('"test_vit"', '"vit_base"'))
    assert main(["sweep", *common, "--plans", str(other)]) == 1
    assert "the plan was made for vit_base and the model is test_vit" in capsys.readouterr().err


def test_verify_checks_a_plan(plan_file: Path, tmp_path: Path, capsys: Any) -> None:
    record = tmp_path / "record.json"
    command = ["verify", "--model", "test_vit", "--num-classes", "3", "--device", "cpu"]
    assert main([*command, "--plan", str(plan_file), "--json", str(record)]) == 0
    assert "plan.json: fits, 60." in capsys.readouterr().out.replace("59.", "60.")
    result = json.loads(record.read_text())
    assert result["macs_ratio"] == pytest.approx(result["plan"]["macs_ratio"], abs=1e-4)


def test_verify_tells_a_plan_that_does_not_cost_what_it_says(
    plan_file: Path, tmp_path: Path, capsys: Any
) -> None:
    changed = json.loads(plan_file.read_text()) | {"macs_ratio": 0.4}
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    command = ["verify", "--model", "test_vit", "--num-classes", "3", "--device", "cpu"]
    assert main([*command, "--plan", str(path)]) == 1
    assert "the plan says 0.4000 of the dense MACs and 0.6" in capsys.readouterr().err.replace("0.59", "0.6")


def test_a_plan_for_a_speed_up_is_measured_and_written(
    common: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpvit.machine.timer.least_seconds", lambda runs, device: [1.0] * len(runs))
    asked: list[float] = []

    def found(
        model: Any, images: Any, speedup: float, options: TuneOptions, timing: SpeedupOptions, **told: Any
    ) -> SpeedTuned:
        asked.extend([speedup, timing.batch_size])
        tuned = tune(model, images, Target(macs=0.6), TuneOptions(trials=1))
        here = describe_environment(images.device, images.dtype, 0)
        return SpeedTuned(tuned, Speedup(1.52, 1.5, 1.55), speedup, timing.batch_size, 1, here)

    monkeypatch.setattr("cpvit.commands.plan.tune_speedup", found)
    out, record = tmp_path / "plan.json", tmp_path / "record.json"
    command = ["plan", *common, "--speedup", "1.5", "--batch-size", "6", "--out", str(out)]
    assert main([*command, "--json", str(record)]) == 0
    assert asked == [1.5, 6]
    assert "1.52x (1.50x to 1.55x), 1.5x wanted" in capsys.readouterr().out
    assert json.loads(record.read_text())["speedup"]["median"] == 1.52
    assert Plan.load(out).schedule == "search"
