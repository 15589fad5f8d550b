"""The command line: what it prints, what it writes, and how it says no."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from conftest import add_member, randomize_, shared_path
from PIL import Image
from safetensors.torch import save_file

from cpvit import PruneConfig, prune_
from cpvit.commands.cli import main, run_cli
from cpvit.commands.original import run_eval

VERBS = ("eval", "benchmark", "finetune", "verify", "models", "demo")
MODEL = "test_vit"
"""timm's own model for tests: 6 blocks, 2 heads, 100 patches of 160x160."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = timm.create_model(MODEL, num_classes=3)
    randomize_(model, 0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def evaluation(checkpoint: Path, tiny_tar: Path) -> list[str]:
    return [
        "eval",
        "--model",
        MODEL,
        "--checkpoint",
        str(checkpoint),
        "--data",
        str(tiny_tar),
        "--device",
        "cpu",
    ]


def record_of(arguments: list[str], folder: Path) -> Any:
    path = folder / "record.json"
    assert main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The one line that a failing command ends with on stderr; nothing goes to stdout."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == ""
    assert lines[-1].startswith("cpvit: error: ")
    assert "Traceback" not in captured.err
    assert sum("error" in line for line in lines) == 1
    return lines[-1].removeprefix("cpvit: error: ")


class TestHelp:
    def test_it_lists_every_verb(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        text = capsys.readouterr().out
        assert all(f"• {verb}" in text for verb in VERBS)

    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_explains_its_flags(self, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([verb, "--help"]) == 0
        assert "--json" in capsys.readouterr().out or verb == "verify"

    def test_the_same_from_a_shell(self) -> None:
        code = "import sys; from cpvit.commands.cli import entry_point; sys.argv = ['cpvit', 'evil']; entry_point()"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("cpvit: error: ")
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Expected one of {eval, benchmark"),
        (["evil"], "Unrecognized options: evil"),
        (["verify"], "Missing from cpvit verify: --model"),
        (["verify", "--model", MODEL, "--dtype", "int8"], "invalid choice 'int8' for argument '--dtype'"),
        (["benchmark", "--model", MODEL, "--keep-rate", "2"], "keep_rate must be a fraction above 0"),
        (["benchmark", "--model", MODEL, "--keep-rate", ".5", "--macs", ".5"], "not keep_rate and macs"),
        (["benchmark", "--model", MODEL, "--batch-size", "many"], "many"),
    ],
)
def test_a_command_line_that_cannot_be_understood_ends_with_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in complaint(arguments, capsys, 2)


EVAL = ["eval", "--model", MODEL, "--data", "nowhere.tar"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (EVAL, "random weights have no accuracy to measure: give --checkpoint FILE, or --pretrained"),
        ([*EVAL, "--checkpoint", "x.pth", "--pretrained"], "give --checkpoint or --pretrained, not both"),
        ([*EVAL, "--checkpoint", "nowhere.pth"], "nowhere.pth: no such file"),
        (["verify", "--model", "vit_tinny"], "unknown model 'vit_tinny'; did you mean"),
        (["verify", "--model", "resnet18"], "ResNet cannot be pruned"),
        (["verify", "--model", MODEL, "--device", "abacus"], "device must be auto, cpu, cuda, cuda:1 ..."),
        (
            ["verify", "--model", MODEL, "--image-size", "1", "2", "3"],
            "--image-size takes one number, or height",
        ),
        (
            ["verify", "--model", MODEL, "--image-size", "161"],
            "image size 161x161 is not a multiple of the 16x16",
        ),
        (["benchmark", "--model", MODEL, "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["benchmark", "--model", MODEL, "--head-keep-rate", ".5"], "needs calibration images"),
        (["benchmark", "--model", MODEL, "--schedule", "layer-aware"], "give calibration images"),
        (["benchmark", "--model", MODEL, "--method", "magic"], "method must be one of cpvit"),
        (["benchmark", "--model", MODEL, "--macs", "0.01"], "macs=0.01 cannot be met by pruning patches"),
        (
            ["models", "--pattern", "nosuchmodel"],
            "no model that can be pruned matches 'nosuchmodel'; supported:",
        ),
    ],
)
def test_a_mistake_is_one_line_and_ends_with_1(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in complaint(arguments, capsys, 1)


def test_images_that_are_not_there_are_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file or folder: nowhere.tar" in complaint(
        [*EVAL, "--checkpoint", str(checkpoint)], capsys, 1
    )


def test_a_bug_shows_its_traceback() -> None:
    def bug() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_cli(bug, [], prog="test")


def test_an_interruption_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_cli(interrupted, [], prog="test") == 130
    assert capsys.readouterr().err == "test: interrupted\n"


def test_a_reader_that_went_away_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    def unread() -> None:
        raise BrokenPipeError

    assert run_cli(unread, [], prog="test") == 1
    assert capsys.readouterr().err == ""


class TestEval:
    def test_the_record_has_the_promised_fields(self, evaluation: list[str], tmp_path: Path) -> None:
        record = record_of([*evaluation, "--keep-rate", "0.4"], tmp_path)
        dense, pruned = record["dense"], record["pruned"]
        assert list(dense) == ["top1", "top5", "macs", "params"]
        assert list(pruned) == [*dense, "tokens_per_block", "heads_per_block"]
        promised = {
            "dense",
            "pruned",
            "macs_ratio",
            "agreement",
            "kl",
            "images",
            "images_skipped",
            "environment",
        }
        assert promised <= set(record)
        assert record["images"] == 12
        assert record["images_skipped"] == 0
        assert pruned["tokens_per_block"][-1] == 41
        assert pruned["heads_per_block"] == [2] * 6
        assert record["macs_ratio"] == pruned["macs"] / dense["macs"] < 1
        assert pruned["params"] == dense["params"]
        assert 0 <= record["agreement"] <= 1
        assert record["kl"] > 0
        assert {"versions", "device", "dtype", "threads", "seed"} <= set(record["environment"])

    def test_it_prints_one_table_and_says_the_rest_on_stderr(
        self, evaluation: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        record = record_of(evaluation, tmp_path)
        captured = capsys.readouterr()
        assert f"dense   {record['dense']['top1']:.2f}" in captured.out.replace("    ", "  ")
        assert f"agreement {record['agreement']:.4f}" in captured.out
        assert f"{100 * record['macs_ratio']:.2f}% of dense" in captured.out
        assert "record:" not in captured.out
        assert "record:" in captured.err

    def test_a_limit_is_a_sample_that_the_seed_decides(self, evaluation: list[str], tmp_path: Path) -> None:
        first, again, other = (
            record_of([*evaluation, "--limit", "6", "--seed", seed], tmp_path) for seed in ("0", "0", "1")
        )
        assert first.pop("made_by")["command"].startswith("cpvit eval --model test_vit")
        del again["made_by"]
        assert first == again
        assert first["images"] == other["images"] == 6
        assert first["kl"] != other["kl"]

    def test_heads_without_calibration_images_are_chosen_on_the_evaluated_ones(
        self, evaluation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        record = record_of([*evaluation, "--head-keep-rate", "0.5"], tmp_path)
        assert record["pruned"]["heads_per_block"][-1] == 1
        assert record["pruned"]["params"] < record["dense"]["params"]
        assert "no --calibration given" in capsys.readouterr().err

    def test_calibration_images_make_the_schedule_layer_aware(
        self, evaluation: list[str], tiny_tar: Path, tmp_path: Path
    ) -> None:
        calibrated = [*evaluation, "--calibration", str(tiny_tar), "--calibration-limit", "5"]
        plan = record_of(calibrated, tmp_path)["plan"]
        assert (plan["schedule"], plan["calibration_images"]) == ("layer-aware", 5)

    def test_bad_images_stop_it_or_are_skipped_and_named(
        self, evaluation: list[str], tiny_tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        broken = tmp_path / "broken.tar"
        with tarfile.open(tiny_tar) as whole, tarfile.open(broken, "w") as archive:
            for member in whole.getmembers():
                add_member(archive, member.name, whole.extractfile(member).read())
            add_member(archive, "bee/broken.png", b"no image")
        evaluation = [str(broken) if argument == str(tiny_tar) else argument for argument in evaluation]
        assert "broken.png" in complaint(evaluation, capsys, 1)
        record = record_of([*evaluation, "--skip-bad-images"], tmp_path)
        assert (record["images"], record["images_skipped"]) == (12, 1)
        assert "skipped 1 unreadable images: " in capsys.readouterr().out

    def test_explicit_numbers_of_patches(self, evaluation: list[str], tmp_path: Path) -> None:
        counts = ["90", "80", "70", "60", "50", "40"]
        record = record_of([*evaluation, "--keep-per-block", *counts], tmp_path)
        assert record["pruned"]["tokens_per_block"] == [int(count) + 1 for count in counts]

    def test_preprocessing_can_be_changed(self, evaluation: list[str], tmp_path: Path) -> None:
        own = record_of(evaluation, tmp_path)
        changed = record_of([*evaluation, "--mean", "0.1", "0.2", "0.3", "--crop-pct", "0.5"], tmp_path)
        assert own["kl"] != changed["kl"]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
    def test_other_dtypes(self, evaluation: list[str], tmp_path: Path, dtype: str) -> None:
        assert record_of([*evaluation, "--dtype", dtype], tmp_path)["environment"]["dtype"] == dtype


class TestBenchmark:
    def test_the_record_has_the_promised_fields(self, tmp_path: Path) -> None:
        arguments = ["benchmark", "--model", MODEL, "--batch-size", "2", "--seconds", "0", "--device", "cpu"]
        record = record_of([*arguments, "--macs", "0.6"], tmp_path)
        for side in (record["dense"], record["pruned"]):
            assert {"images_per_s", "latency_ms", "peak_memory_mib"} <= set(side)
            assert list(side["latency_ms"]) == ["median", "p10", "p90"]
            assert side["images_per_s"] > 0
        assert {"speedup", "macs_ratio", "efficiency", "peak_memory_mib"} <= set(record)
        assert record["macs_ratio"] == pytest.approx(0.6, rel=0.005)
        assert record["efficiency"] == pytest.approx(record["speedup"] * record["macs_ratio"])

    def test_it_says_what_the_clock_made_of_the_count(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["benchmark", "--model", MODEL, "--batch-size", "1", "--seconds", "0", "--keep-rate", "1"]
        assert main(arguments) == 0
        assert "for 100.0% of the MACs: efficiency" in capsys.readouterr().out


class TestBenchmarkOfSeveral:
    COMMON: ClassVar[list[str]] = ["benchmark", "--model", MODEL, "--seconds", "0", "--device", "cpu"]

    def test_every_setting_and_method_has_a_row(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lists = ["--methods", "cpvit,tome", "--batch-sizes", "1,2", "--dtypes", "float32,bfloat16"]
        sizes = ["--image-sizes", "96,128", "--align", "none", "--macs", "0.7"]
        record = record_of([*self.COMMON, *lists, *sizes], tmp_path)
        settings = [
            (entry["image_size"], entry["environment"]["dtype"], entry["batch_size"])
            for entry in record["settings"]
        ]
        assert settings == [
            ([side, side], dtype, batch)
            for side in (96, 128)
            for dtype in ("float32", "bfloat16")
            for batch in (1, 2)
        ]
        rows = [row for entry in record["settings"] for row in entry["rows"]]
        assert [row["name"] for row in rows] == ["cpvit", "tome"] * 8
        assert all({"speedup", "macs_ratio", "efficiency", "verdict", "timing"} <= set(row) for row in rows)
        text = capsys.readouterr().out
        assert sum(line.startswith("dense ") for line in text.splitlines()) == 8
        assert "of 16 runs were faster than dense" in text

    def test_a_method_may_name_its_schedule(self, tmp_path: Path) -> None:
        asked = [
            "--methods",
            "cpvit,cpvit:linear-ramp",
            "--batch-size",
            "1",
            "--align",
            "none",
            "--macs",
            "0.7",
        ]
        (setting,) = record_of([*self.COMMON, *asked], tmp_path)["settings"]
        assert [row["name"] for row in setting["rows"]] == ["cpvit", "cpvit:linear-ramp"]
        assert [row["plan"]["schedule"] for row in setting["rows"]] == ["curve", "linear-ramp"]

    def test_what_does_not_fit_is_named_after_the_others_ran(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        record = tmp_path / "record.json"
        lists = ["--methods", "cpvit,magic", "--image-sizes", "96,100", "--align", "none"]
        assert main([*self.COMMON, "--batch-size", "1", *lists, "--json", str(record)]) == 1
        captured = capsys.readouterr()
        assert "magic: not run, method must be one of cpvit" in captured.out
        assert "cpvit" in captured.out
        last = captured.err.strip().splitlines()[-1]
        assert last.startswith(
            "cpvit: error: 3 of 4 runs failed: magic at 96, batch 1, float32: method must be"
        )
        assert "cpvit at 100, batch 1, float32: image size 100x100 is not a multiple of" in last
        written = json.loads(record.read_text())
        assert len(written["failed"]) == 3
        assert [row["name"] for row in written["settings"][0]["rows"]] == ["cpvit"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (
                ["--method", "tome", "--methods", "cpvit"],
                "give --method or --methods, not both (got tome and",
            ),
            (["--batch-sizes", "1;2"], "expected whole numbers separated by commas, got '1;2'"),
            (["--dtypes", "int8"], "dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
            (["--end-to-end"], "--end-to-end times the way of real images: give --data as well"),
            (["--data", "x.tar"], "--data is for --end-to-end; without it the forward alone is timed"),
            (["--align", "0"], "align must be a number of tokens of at least 1, auto or none, got 0"),
            (["--align", "128"], "align=128 leaves nothing to prune in test_vit, which has 101 tokens"),
        ],
    )
    def test_lists_and_flags_that_make_no_sense(
        self, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status = 2 if arguments == ["--align", "0"] else 1
        assert words in complaint([*self.COMMON, *arguments], capsys, status)

    def test_real_images_are_timed_from_their_files(self, tiny_tar: Path, tmp_path: Path) -> None:
        data = [
            "--end-to-end",
            "--data",
            str(tiny_tar),
            "--limit",
            "5",
            "--batch-size",
            "2",
            "--align",
            "none",
        ]
        record = record_of([*self.COMMON, *data], tmp_path)
        assert record["end_to_end"]
        assert record["dense"]["images_per_s"] > 0

    def test_a_plan_is_one_more_row(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = timm.create_model(MODEL)
        plan = prune_(model, PruneConfig(method="tome", macs=0.7, align=8))
        plan.save(tmp_path / "plan.json")
        lists = [
            "--methods",
            "cpvit",
            "--batch-sizes",
            "1",
            "--align",
            "8",
            "--plan",
            str(tmp_path / "plan.json"),
        ]
        record = record_of([*self.COMMON, *lists], tmp_path)
        rows = record["settings"][0]["rows"]
        assert [(row["name"], row["plan"]["align"]) for row in rows] == [("cpvit", 8), ("plan (tome)", 8)]
        assert rows[1]["plan"]["patches_per_block"] == list(plan.patches_per_block)


class TestVerify:
    def test_a_model_that_is_known(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", "--model", MODEL]) == 0
        assert capsys.readouterr().out.startswith(f"{MODEL}: keep-everything error ")

    def test_a_model_that_is_not(self, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr("cpvit.adapters.timm_vit.TimmBlock.mlp_residual", lambda _, x: x)
        assert "first in block 0" in complaint(["verify", "--model", MODEL], capsys, 1)


class TestModels:
    def test_a_pattern_lists_what_can_be_pruned(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        path = tmp_path / "models.json"
        assert main(["models", "--pattern", "test_vit", "--json", str(path)]) == 0
        text = capsys.readouterr().out
        rows = json.loads(path.read_text())
        assert {"test_vit", "test_vit2"} <= {row["model"] for row in rows}
        assert all(row["model"] in text for row in rows)
        first = next(row for row in rows if row["model"] == "test_vit")
        expected = {"family": "timm ViT", "blocks": 6, "heads": 2, "tokens": 101, "image": "160x160"}
        assert {name: first[name] for name in expected} == expected

    def test_names_of_the_original_code_are_listed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["models", "--pattern", "vit-b_32"]) == 0
        assert "ViT-B_32" in capsys.readouterr().out


class TestOriginalCommandLines:
    """eval.py and train.py of the original code."""

    ROOT = Path(__file__).resolve().parents[2]

    @pytest.mark.parametrize("script", ["eval.py", "train.py"])
    def test_the_scripts_know_the_original_flags(
        self, script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(self.ROOT / script), run_name="__main__")
        text = capsys.readouterr().out.replace("_", "-")
        flags = (
            "--name",
            "--dataset",
            "--model-type",
            "--pretrained-dir",
            "--output-dir",
            "--img-size",
            "--fp16",
        )
        assert all(flag in text for flag in flags)

    def test_a_checkpoint_that_is_not_there_is_one_line(self, monkeypatch: Any, capsys: Any) -> None:
        monkeypatch.setattr("cpvit.commands.original.create_model", lambda *_, **__: timm.create_model(MODEL))
        assert run_cli(run_eval, ["--pretrained_dir=nowhere.pth"], prog="eval.py") == 1
        assert capsys.readouterr().err == "eval.py: error: nowhere.pth: no such file\n"

    def test_cifar_is_evaluated_dense_and_pruned(
        self, monkeypatch: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        def create(name: str, *, num_classes: int, image_size: int) -> Any:
            assert (name, num_classes, image_size) == ("ViT-B_16", 10, 32)
            return timm.create_model(MODEL, num_classes=num_classes, img_size=image_size).eval()

        monkeypatch.setattr("cpvit.commands.original.create_model", create)
        torch.save(create("ViT-B_16", num_classes=10, image_size=32).state_dict(), tmp_path / "w.pth")
        classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        for number, name in enumerate(classes):
            folder = tmp_path / "data" / "test" / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (25 * number, 9, 200)).save(folder / "0.png")
        flags = ["--name=mine", "--dataset=cifar10", f"--pretrained_dir={tmp_path}/w.pth", "--img_size=32"]
        assert run_cli(run_eval, [*flags, f"--data_dir={tmp_path}/data", "--device=cpu"], prog="eval.py") == 0
        text = capsys.readouterr().out
        assert text.startswith("mine: cifar10, ViT-B_16")
        assert "10 images" in text


def test_deit_tiny_on_imagenet_is_as_accurate_as_published_here(tmp_path: Path) -> None:
    """A fifth of the 650 images: dense accuracy is pinned exactly, the pruned model's agreement from below."""
    weights = shared_path("weights/deit_tiny_patch16_224.safetensors")
    data = shared_path("data/imagenet-val-650.tar")
    torch.manual_seed(0)
    arguments = [
        "eval",
        "--model",
        "deit_tiny_patch16_224",
        "--checkpoint",
        str(weights),
        "--data",
        str(data),
    ]
    record = record_of([*arguments, "--limit", "130", "--macs", "0.6", "--device", "cpu"], tmp_path)
    assert record["images"] == 130
    assert record["dense"]["top1"] == pytest.approx(100 * 105 / 130)
    assert record["dense"]["top5"] == pytest.approx(100 * 124 / 130)
    assert record["dense"]["macs"] == 1_253_683_200
    assert record["macs_ratio"] == pytest.approx(0.6, rel=0.005)
    assert record["agreement"] >= 0.9
    assert record["kl"] < 0.15


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_real_data_that_is_missing_fails_on_ci_and_skips_elsewhere(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="nothing-of-that-name"):
        shared_path("nothing-of-that-name")


def test_verify_writes_its_record(tmp_path: Path) -> None:
    record = record_of(["verify", "--model", MODEL, "--device", "cpu"], tmp_path)
    assert record["error"] <= record["tolerance"]
    assert record["first_block"] is None
