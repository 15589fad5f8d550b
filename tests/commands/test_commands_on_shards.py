"""Every subcommand on shards: the numbers are those of the same images in class folders."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import add_member, randomize_
from PIL import Image
from safetensors.torch import load_file, save_file

from cpvit.commands import finetune as finetune_command
from cpvit.commands.cli import main
from cpvit.finetune.progress import ProgressBar

CLASSES, EACH, SHARDS = 3, 4, 5
SIDE = 64


def picture(number: int) -> bytes:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (80, 70, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path) -> Path:
    """12 images in 5 shards, in the order in which class folders list them."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as archive:
            for number in range(CLASSES * EACH):
                if number * SHARDS // (CLASSES * EACH) == shard:
                    add_member(archive, f"{number:04}.png", picture(number))
                    add_member(archive, f"{number:04}.cls", str(number // EACH).encode())
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same images as class folders, in a folder of shards, and by a pattern."""
    root = tmp_path_factory.mktemp("data")
    for number in range(CLASSES * EACH):
        path = root / "folder" / str(number // EACH) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    shards = write_shards(root / "shards")
    return {
        "folder": str(root / "folder"),
        "shards": str(shards),
        "pattern": f"{shards}/{{000000..000004}}.tar",
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = timm.create_model("test_vit", num_classes=CLASSES, img_size=SIDE)
    randomize_(model, 0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path


NOT_COMPARED = ("seconds", "images_per_s", "environment", "data", "made_by", "image")


def record_of(verb: str, data: str, weights: Path, folder: Path, more: Sequence[str]) -> Any:
    """What a subcommand writes, without what the clock says and the names of the data."""
    record = folder / "record.json"
    common = [
        "--model",
        "test_vit",
        "--image-size",
        str(SIDE),
        "--device",
        "cpu",
        "--checkpoint",
        str(weights),
    ]
    assert main([verb, *common, "--data", data, *more, "--json", str(record)]) == 0
    return without(json.loads(record.read_text()), NOT_COMPARED)


def without(record: Any, names: tuple[str, ...]) -> Any:
    if isinstance(record, list):
        return [without(value, names) for value in record]
    if not isinstance(record, dict):
        return record
    return {key: without(value, names) for key, value in record.items() if key not in names}


@pytest.mark.parametrize("kind", ["shards", "pattern"])
@pytest.mark.parametrize(
    ("more", "images"),
    [
        ([], 12),
        (["--limit", "5", "--seed", "3"], 5),
        (["--leave-out", "4", "--workers", "1"], 8),
        (["--leave-out", "2", "--limit", "7"], 7),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_eval(
    sources: dict[str, str], weights: Path, tmp_path: Path, kind: str, more: list[str], images: int
) -> None:
    asked = ["--macs", "0.7", "--batch-size", "5", *more]
    expected = record_of("eval", sources["folder"], weights, tmp_path, asked)
    assert record_of("eval", sources[kind], weights, tmp_path, asked) == expected
    assert expected["images"] == images


def test_plan_and_what_is_left_out_of_the_evaluation(
    sources: dict[str, str], weights: Path, tmp_path: Path
) -> None:
    made = ["--limit", "6", "--macs", "0.6", "--trials", "5", "--align", "none", "--out"]
    plans = {kind: tmp_path / f"{kind}.json" for kind in ("folder", "shards")}
    records = [
        record_of("plan", sources[kind], weights, tmp_path, [*made, str(plan)])
        for kind, plan in plans.items()
    ]
    assert records[0] == records[1]
    assert json.loads(plans["folder"].read_text()) == json.loads(plans["shards"].read_text())
    applied = ["--leave-out", "6", "--plan", str(plans["shards"])]
    results = [record_of("eval", sources[kind], weights, tmp_path, applied) for kind in plans]
    assert results[0] == results[1]
    assert results[0]["images"] == 6


def test_a_plan_that_keeps_the_accuracy_reads_the_labels(
    sources: dict[str, str], weights: Path, tmp_path: Path
) -> None:
    asked = ["--max-drop", "40", "--trials", "3", "--align", "none", "--out", str(tmp_path / "plan.json")]
    results = [record_of("plan", sources[kind], weights, tmp_path, asked) for kind in ("folder", "shards")]
    assert results[0] == results[1]


def test_sweep_with_shards_for_calibration_as_well(
    sources: dict[str, str], weights: Path, tmp_path: Path
) -> None:
    results = []
    for kind in ("folder", "shards"):
        asked = ["--methods", "cpvit,tome", "--macs", "0.7", "--searched", "cpvit", "--trials", "3"]
        asked += ["--calibration", sources[kind], "--calibration-limit", "5"]
        results.append(record_of("sweep", sources[kind], weights, tmp_path, asked))
    assert results[0] == results[1]
    assert [point["schedule"] for point in results[0]["points"]] == ["search", "constant"]


def test_benchmark_end_to_end(sources: dict[str, str], weights: Path, tmp_path: Path) -> None:
    asked = ["--end-to-end", "--limit", "5", "--batch-size", "2", "--align", "none"]
    record = tmp_path / "record.json"
    common = ["benchmark", "--model", "test_vit", "--image-size", str(SIDE), "--device", "cpu"]
    assert main([*common, "--data", sources["shards"], *asked, "--json", str(record)]) == 0
    assert json.loads(record.read_text())["end_to_end"]


def test_bad_images_are_skipped_and_counted(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_shards(tmp_path / "shards") / "000001.tar"
    data = bytearray(shard.read_bytes())
    start = data.index(b"\x89PNG")
    data[start : start + 8] = b"no image"
    shard.write_bytes(data)
    bad = tmp_path / "shards"
    assert (
        record_of("eval", str(bad), weights, tmp_path, ["--macs", "0.7", "--skip-bad-images"])["images"] == 11
    )
    common = [
        "--model",
        "test_vit",
        "--image-size",
        str(SIDE),
        "--device",
        "cpu",
        "--checkpoint",
        str(weights),
    ]
    capsys.readouterr()
    assert main(["eval", *common, "--data", str(bad), "--macs", "0.7"]) == 1
    assert "000001.tar:0003.png: Pillow does not recognise it as an image" in capsys.readouterr().err


class Interrupted(ProgressBar):
    """Ctrl-C after three steps."""

    def on_steps(self, logs: Any) -> None:
        super().on_steps(logs)
        if logs[-1].step == 3:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("limit", [[], ["--train-limit", "7"]])
def test_a_finetuning_on_shards_goes_on_exactly(
    sources: dict[str, str],
    weights: Path,
    tmp_path: Path,
    limit: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def asked(folder: str, *more: str) -> list[str]:
        common = ["finetune", "--model", "test_vit", "--image-size", str(SIDE), "--device", "cpu"]
        common += [
            "--checkpoint",
            str(weights),
            "--data",
            sources["shards"],
            "--eval-data",
            sources["shards"],
        ]
        common += ["--num-steps", "6", "--batch-size", "4", "--checkpoint-every", "2", "--macs", "0.7"]
        common += ["--mixup", "0.8", "--no-tensorboard", "--output-dir", str(tmp_path / folder), *limit]
        return [*common, *more]

    assert main(asked("whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(finetune_command, "ProgressBar", Interrupted)
        assert main(asked("parts")) == 130
    capsys.readouterr()
    assert main(asked("parts", "--resume", "--workers", "1")) == 0
    assert "going on after step 2 of 6" in capsys.readouterr().err
    whole, parts = (json.loads((tmp_path / run / "record.json").read_text()) for run in ("whole", "parts"))
    assert len(whole["history"]["loss"]) == 6
    for name in ("loss", "grad_norm"):
        assert parts["history"][name] == whole["history"][name]
    one, other = (load_file(tmp_path / run / "last/model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert main(asked("parts", "--resume", "--train-limit", "5")) == 1
    assert "train_images was" in capsys.readouterr().err
