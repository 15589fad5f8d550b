"""``cpvit export`` from the command line, and what ``cpvit eval`` makes of the file."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from conftest import randomize_
from safetensors.torch import save_file

from cpvit.commands.cli import main

for package in ("onnxscript", "onnxruntime", "openvino", "nncf"):
    pytest.importorskip(package)

SIDE = 48


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = timm.create_model("test_vit", num_classes=3, img_size=SIDE)
    randomize_(model, 0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path


def asked(weights: Path) -> list[str]:
    return ["--model", "test_vit", "--image-size", str(SIDE), "--device", "cpu", "--checkpoint", str(weights)]


@pytest.fixture(scope="module")
def exported(weights: Path, tiny_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 file with the normalisation inside, made by one command from a checkpoint and images."""
    out = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    more = ["--int8", "--with-preprocessing", "--calibration", str(tiny_tar), "--calibration-limit", "9"]
    budget = ["--method", "cpvit-merge", "--macs", "0.7"]
    assert main(["export", *asked(weights), *budget, *more, "--to", "onnx", "--out", str(out)]) == 0
    return out


def test_the_report_and_the_evaluation(
    exported: Path, weights: Path, tiny_tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(exported.with_name("tiny.onnx.json").read_text())
    assert report["parity"]["images"] == 2, "a quarter of nine is not calibrated on"
    assert report["parity"]["real_images"] is True
    assert report["precision"] == "int8"
    assert report["input"] == {"name": "images", "dtype": "uint8", "shape": ["batch", SIDE, SIDE, 3]}
    assert report["plan"]["dial"] == "macs=0.7"
    record = tmp_path / "record.json"
    line = [
        "eval",
        "--exported",
        str(exported),
        "--data",
        str(tiny_tar),
        "--batch-size",
        "5",
        "--json",
        str(record),
    ]
    assert main([*line, *asked(weights)]) == 0
    found = json.loads(record.read_text())
    assert found["images"] == 12
    assert found["dense"]["kl"] > 0
    assert 0 <= found["top1"] <= 100
    shown = capsys.readouterr().out
    assert "test_vit for onnx, 12 images" in shown
    assert "dense, torch" in shown
    assert main(line) == 0
    alone = json.loads(record.read_text())
    assert alone["dense"] is None
    assert alone["top1"] == found["top1"]


def test_a_dense_file_of_a_fixed_batch_is_evaluated_as_torch_is(
    weights: Path, tiny_tar: Path, tmp_path: Path
) -> None:
    out, record = tmp_path / "dense.onnx", tmp_path / "record.json"
    assert main(["export", *asked(weights), "--dense", "--batch-size", "5", "--out", str(out)]) == 0
    assert (
        main(
            ["eval", "--exported", str(out), "--data", str(tiny_tar), "--json", str(record), *asked(weights)]
        )
        == 0
    )
    dense = json.loads(record.read_text())["dense"]
    assert dense["agreement"] == 1
    assert dense["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--int8"], "int8 needs calibration images"),
        (["--dense", "--macs", "0.6"], "--dense prunes nothing; leave out --plan"),
        (["--to", "openvino"], "a file for openvino ends in .xml, got m.onnx"),
        (["--int8", "--calibration", "nowhere"], "nowhere"),
        (["--plan", "nowhere.json"], "cannot read the plan nowhere.json"),
    ],
)
def test_mistakes_are_named(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["export", *asked(weights), *more, "--out", str(tmp_path / "m.onnx")]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_another_model_is_refused(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    values = {"model": "other", "method": "cpvit", "num_patches": 4, "num_prefix": 1}
    plan.write_text(json.dumps({**values, "patches_per_block": [2, 1], "num_heads": [2, 2]}))
    assert main(["export", *asked(weights), "--plan", str(plan), "--out", str(tmp_path / "m.onnx")]) == 1
    assert "plan" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [plan]


def test_a_folder_that_cannot_be_written_to(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["export", *asked(weights), "--out", str(tmp_path / "file" / "m.onnx")]) == 1
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(("to", "suffix"), [("onnx", ".onnx"), ("openvino", ".xml"), ("torch", ".pt2")])
def test_a_full_disk_leaves_nothing_behind(weights: Path, tmp_path: Path, to: str, suffix: str) -> None:
    """Files may only grow to 100 kB, as on a disk with no more room."""
    code = "import sys; from cpvit.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["export", *asked(weights), "--to", to, "--out", str(tmp_path / f"m{suffix}")]
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert found.returncode == 1, found.stderr
    assert "Traceback" not in found.stderr
    assert "cpvit: error: " in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_given_to_eval(
    tiny_tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(b"no model at all")
    assert main(["eval", "--exported", str(foreign), "--data", str(tiny_tar)]) == 1
    assert "ONNX Runtime cannot read" in capsys.readouterr().err
    assert main(["eval", "--exported", str(foreign), "--data", str(tiny_tar), "--macs", "0.5"]) == 1
    assert "--exported holds its plan" in capsys.readouterr().err
    assert main(["eval", "--data", str(tiny_tar)]) == 1
    assert "give --model NAME, or --exported FILE" in capsys.readouterr().err
