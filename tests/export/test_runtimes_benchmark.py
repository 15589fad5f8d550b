"""The benchmark over runtimes: who takes part, what is compared with what, and what cannot be run is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_vit

from cpvit import PruneConfig
from cpvit.commands.cli import main
from cpvit.export.benchmark import compare_runtimes

for package in ("onnxscript", "onnxruntime", "openvino", "nncf"):
    pytest.importorskip(package)


def test_rows_are_compared_with_dense_in_their_own_runtime() -> None:
    model = tiny_vit(depth=2).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compare_runtimes(
        model,
        {"cpvit": PruneConfig(macs=0.7), "odd": PruneConfig(macs=0.001)},
        ("torch", "onnxruntime"),
        ("float32", "bfloat16"),
        batch_size=2,
        seconds=0.01,
    )
    rows = {(row.runtime, row.dtype, row.name): row for row in result.rows}
    pairs = [("torch", "float32"), ("onnxruntime", "float32"), ("torch", "bfloat16")]
    assert list(rows) == [(*pair, name) for pair in pairs for name in ("dense", "cpvit")]
    for row in result.rows:
        dense = rows[row.runtime, row.dtype, "dense"]
        assert row.efficiency == pytest.approx(row.speedup.median * row.macs_ratio)
        assert row.macs_ratio == pytest.approx(1 if row.name == "dense" else 0.7, abs=0.01)
        assert (row.plan is None) == (row.name == "dense")
        assert row.images_per_s == pytest.approx(2000 / row.latency_ms.median)
        assert dense.speedup.median == 1
    assert rows["torch", "float32", "dense"].in_all == 1
    reasons = {unfit.name: unfit.error for unfit in result.unfit}
    assert set(reasons) == {"odd", "dense in onnxruntime, bfloat16", "cpvit in onnxruntime, bfloat16"}
    assert "cannot be met" in reasons["odd"]
    assert "no bfloat16 kernels" in reasons["cpvit in onnxruntime, bfloat16"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("runtimes", "dtypes", "message"),
    [
        (
            ("tensorrt",),
            ("float32",),
            "runtime must be among torch, .*openvino, got tensorrt",
        ),
        (("torch",), ("int4",), "dtype must be among float32, bfloat16, int8, got int4"),
    ],
)
def test_unknown_words(runtimes: tuple[str, ...], dtypes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_runtimes(tiny_vit(depth=2).float(), {}, runtimes, dtypes)  # type: ignore[arg-type]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    line = ["benchmark", "--model", "test_vit", "--image-size", "48", "--device", "cpu", "--batch-size", "2"]
    more = ["--runtimes", "openvino", "--dtypes", "int8", "--macs", "0.7", "--seconds", "0.01"]
    assert main([*line, *more, "--json", str(record)]) == 0
    found = json.loads(record.read_text())
    assert [(row["runtime"], row["dtype"], row["name"]) for row in found["rows"]] == [
        ("torch", "float32", "dense"),
        ("torch", "float32", "cpvit"),
        ("openvino", "int8", "dense"),
        ("openvino", "int8", "cpvit"),
    ]
    assert "openvino, int8, cpvit" in capsys.readouterr().out
    assert main([*line, *more, "--batch-sizes", "1,2"]) == 1
    assert "--runtimes takes one --batch-size" in capsys.readouterr().err
