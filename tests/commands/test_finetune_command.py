"""``cpvit finetune`` and the original train.py, from the command line to files that ``cpvit eval`` reads."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import add_member, randomize_
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpvit.commands.cli import main, run_cli
from cpvit.commands.finetune_options import AugmentationOptions
from cpvit.commands.original import run_eval, run_train
from cpvit.data import Augmentation, Mixing
from cpvit.data.cifar import CIFAR10_CLASSES
from cpvit.finetune import Processes

SIDE = 64
MODEL = ["--model", "test_vit", "--image-size", str(SIDE), "--device", "cpu"]
SHORT = ["--num-steps", "2", "--batch-size", "4", "--eval-limit", "3"]


def picture(color: int, seed: int) -> bytes:
    import io

    generator = torch.Generator().manual_seed(seed)
    pixels = (torch.rand(40, 40, 3, generator=generator) * 60 + color).to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of three classes in a tar."""
    path = tmp_path_factory.mktemp("data") / "animals.tar"
    with tarfile.open(path, "w") as archive:
        for split, count in (("train", 4), ("val", 2)):
            for color, name in enumerate(("ant", "bee", "cat")):
                for number in range(count):
                    add_member(archive, f"{split}/{name}/{number}.png", picture(60 * color, number))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head of 7 classes."""
    model = timm.create_model("test_vit", num_classes=7, img_size=SIDE)
    randomize_(model, 0)
    path = tmp_path_factory.mktemp("weights") / "seven.safetensors"
    save_file(model.state_dict(), path)
    return path


def arguments(data: Path, weights: Path, folder: Path, *more: str) -> list[str]:
    common = ["--checkpoint", str(weights), "--data", str(data), "--output-dir", str(folder)]
    return ["finetune", *MODEL, *common, *SHORT, *more]


def test_from_foreign_weights_to_a_pruned_model_that_eval_reads(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(data, weights, tmp_path / "dense", "--dense")) == 0
    captured = capsys.readouterr()
    assert (
        "head not loaded (file 7 classes, model 3); the new head starts from random weights" in captured.err
    )
    assert "dense: nothing pruned" in captured.out
    dense = tmp_path / "dense/best/model.safetensors"

    record = tmp_path / "out.json"
    recipe = ["--method", "cpvit-merge", "--macs", "0.7", "--distill", "0.5", "--distill-features", "0.1"]
    recipe += ["--teacher-checkpoint", str(dense), "--mixup", "0.8", "--rand-augment", "rand-m9-mstd0.5-inc1"]
    recipe += ["--ema-decay", "0.9", "--layer-decay", "0.8", "--tighten-steps", "1", "--dtype", "bfloat16"]
    recipe += ["--drop-path", "0.1"]
    assert main(arguments(data, dense, tmp_path / "pruned", *recipe, "--json", str(record))) == 0
    captured = capsys.readouterr()
    assert "method cpvit-merge, macs=0.7" in captured.out
    found = json.loads(record.read_text())
    assert found.pop("made_by")["record"] == "FinetuneResult"
    assert found == json.loads((tmp_path / "pruned/record.json").read_text())
    assert found["facts"]["num_classes"] == 3
    assert found["facts"]["train_images"].startswith("12 (sha256")
    assert list((tmp_path / "pruned/tensorboard").iterdir())

    for checkpoint in ("best", "last"):
        asked = ["eval", *MODEL, "--data", str(data), "--num-classes", "3"]
        asked += ["--checkpoint", str(tmp_path / "pruned" / checkpoint / "model.safetensors")]
        assert main([*asked, "--plan", str(tmp_path / "pruned/plan.json"), "--json", str(record)]) == 0
        result = json.loads(record.read_text())
        assert result["pruned"]["tokens_per_block"] == [
            1 + kept for kept in found["plan"]["patches_per_block"]
        ]


def test_a_run_goes_on_and_is_not_overwritten(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(data, weights, tmp_path / "run", "--macs", "0.7")
    assert main(asked) == 0
    before = (tmp_path / "run/checkpoint.safetensors").read_bytes()
    capsys.readouterr()
    assert main(asked) == 1
    assert "holds a run already (checkpoint.safetensors)" in capsys.readouterr().err
    assert main([*asked, "--resume", "--learning-rate", "0.5", "--flip", "0.1"]) == 1
    error = capsys.readouterr().err
    assert "flip was 0.5 and is 0.1; learning_rate was 0.0001 and is 0.5" in error
    assert main([*asked, "--resume"]) == 0
    captured = capsys.readouterr()
    assert "going on after step 2 of 2" in captured.err
    assert "test_vit, 2 steps" in captured.out
    assert (tmp_path / "run/checkpoint.safetensors").read_bytes() == before


def test_heads_are_chosen_on_training_images(data: Path, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = ["--macs", "0.7", "--head-keep-rate", "0.5", "--calibration-limit", "6", "--no-tensorboard"]
    assert main(arguments(data, weights, folder, *recipe)) == 0
    plan = json.loads((folder / "plan.json").read_text())
    assert min(len(kept) for kept in plan["heads"]) == 1
    assert plan["calibration_images"] == 6
    kept: Tensor = load_file(folder / "best/model.safetensors")["blocks.5.attn.proj.weight"]
    assert kept.shape == (64, 32)
    assert not (folder / "tensorboard").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dense", "--macs", "0.5"], "--dense prunes nothing; leave out --plan, --method, --macs"),
        (["--pretrained"], "give --checkpoint or --pretrained, not both"),
        (
            ["--distill", "0.5"],
            "has no head for these 3 classes, so the model it starts from has no opinion to distil",
        ),
        (
            ["--teacher-checkpoint", "x.pth"],
            "--teacher-checkpoint is used by --distill and --distill-features",
        ),
        (["--accumulation", "3"], "batch_size 4 cannot be split into 3 equal parts (accumulation)"),
        (["--num-classes", "9"], "has 3 class folders (ant, bee, cat), the model has 9 classes"),
        (["--macs", "0.01"], "macs=0.01 cannot be met by pruning patches"),
        (["--freeze-blocks", "7"], "freeze_blocks is 7 but test_vit has 6 blocks"),
        (["--flip", "2"], "flip is 2.0"),
        (["--drop-path", "1"], "drop_path is 1.0; give a probability of at least 0 and below 1"),
        (["--device", "abacus"], "device must be auto, cpu, cuda"),
    ],
)
def test_a_mistake_is_one_line_and_makes_no_folder(
    more: list[str], words: str, data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(data, weights, tmp_path / "run", *more)) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cpvit: error: ")
    assert words in error
    assert not (tmp_path / "run/best").exists()


def test_weights_are_needed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", *MODEL, "--data", str(data), "--output-dir", str(tmp_path / "run")]) == 1
    assert "finetuning starts from trained weights: give --checkpoint FILE" in capsys.readouterr().err


def test_images_of_one_split_need_others_to_evaluate_on(
    tiny_tar: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(tiny_tar, weights, tmp_path / "run", "--macs", "0.7")
    assert main(asked) == 1
    assert "give the evaluation images with --eval-data" in capsys.readouterr().err
    assert main([*asked, "--eval-data", str(tiny_tar)]) == 0


def test_shards_with_numbers_for_classes(data: Path, weights: Path, tmp_path: Path, capsys: Any) -> None:
    for split, count in (("train", 6), ("val", 3)):
        (tmp_path / "shards" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / f"shards/{split}/000000.tar", "w") as archive:
            for number in range(count):
                add_member(archive, f"{number:04}.png", picture(60 * (number % 3), number))
                add_member(archive, f"{number:04}.cls", str(number % 3).encode())
    asked = arguments(tmp_path / "shards", weights, tmp_path / "run", "--num-classes", "3", "--macs", "0.7")
    assert main(asked) == 0
    assert "3 images" in capsys.readouterr().err
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["facts"]["train_images"].startswith("6 (sha256")


def test_other_weights_to_start_from_are_a_difference(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(data, weights, tmp_path / "run", "--macs", "0.7")) == 0
    other = tmp_path / weights.name
    save_file({**load_file(weights), "head.bias": torch.ones(7)}, other)
    assert main(arguments(data, other, tmp_path / "run", "--macs", "0.7", "--resume")) == 1
    assert "checkpoint was 'seven.safetensors (sha256" in capsys.readouterr().err


@pytest.fixture
def seed_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The original command line, on ten images a split and a small model under the large one's name."""
    monkeypatch.setattr("cpvit.weights.create.ORIGINAL_MODELS", {"ViT-B_16": "test_vit"})
    model = timm.create_model("test_vit", num_classes=1000, img_size=32)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for split in ("train", "test"):
        for number, name in enumerate(CIFAR10_CLASSES):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(picture(20 * number, number))
    return [
        "--name=CP-ViT finetune",
        "--dataset=cifar10",
        "--model_type=ViT-B_16",
        f"--pretrained_dir={tmp_path}/w.pth",
        "--train_batch_size=4",
        "--eval_every=2",
        "--learning_rate=3e-2",
        "--num_steps=3",
        "--decay_type=cosine",
        f"--output_dir={tmp_path}/output",
        f"--data_dir={tmp_path}/data",
        "--img_size=32",
        "--warmup_steps=1",
        "--device=cpu",
    ]


def test_the_original_command_line_trains(
    seed_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--gradient_accumulation_steps=2", "--max_grad_norm=0.5", "--eval_batch_size=3", "--seed=7"]
    assert run_cli(run_train, [*seed_flags, *more], prog="train.py") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("CP-ViT finetune: cifar10, ViT-B_16")
    assert "head not loaded (file 1000 classes, model 10)" in captured.err
    record = json.loads((tmp_path / "output/record.json").read_text())
    assert record["history"]["learning_rate"] == pytest.approx([0, 0.03, 0.015])
    assert [evaluation["step"] for evaluation in record["evaluations"]] == [2, 3]
    optimization = record["config"]["optimization"]
    assert (optimization["optimizer"], optimization["momentum"], optimization["max_grad_norm"]) == (
        "sgd",
        0.9,
        0.5,
    )
    assert record["plan"]["patches_per_block"][-1] == 2, "half of the four patches"

    finetuned = f"--pretrained_dir={tmp_path}/output/best/model.safetensors"
    evaluation = [flag for flag in seed_flags if not flag.startswith("--pretrained")]
    assert run_cli(run_eval, [*evaluation, finetuned], prog="eval.py") == 0
    assert "10 images" in capsys.readouterr().out


def test_the_original_command_line_goes_on(
    seed_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear: list[Any] = [*seed_flags, "--decay_type=linear", "--fp16"]
    assert run_cli(run_train, linear, prog="train.py") == 0
    assert run_cli(run_train, linear, prog="train.py") == 1
    assert "--resume" in capsys.readouterr().err
    assert run_cli(run_train, [*linear, "--resume"], prog="train.py") == 0
    record = json.loads((tmp_path / "output/record.json").read_text())
    assert record["environment"]["dtype"] == "float16"


def recorded(asked: list[str], folder: Path, *more: str) -> Any:
    assert main([*asked, "--output-dir", str(folder), *more]) == 0
    return json.loads((folder / "record.json").read_text())


@pytest.mark.parametrize(
    "flags",
    [
        ["--label-smoothing", "0.5"],
        ["--mixup", "0.8"],
        ["--cutmix", "0.8"],
        ["--flip", "1"],
        ["--crop-scale", "0.1", "0.2"],
        ["--no-random-crop"],
        ["--color-jitter", "0.9"],
        ["--random-erasing", "1"],
        ["--rand-augment", "rand-m9-mstd0.5-inc1"],
        ["--drop-path", "0.9"],
        ["--seed", "1"],
        ["--mean", "0.1", "0.1", "0.1"],
    ],
)
def test_a_flag_about_training_images_changes_the_first_loss(
    flags: list[str], data: Path, weights: Path, plain_loss: float, tmp_path: Path
) -> None:
    record = recorded(one_step(data, weights), tmp_path / "run", *flags)
    assert abs(record["history"]["loss"][0] - plain_loss) > 1e-4


def test_the_same_command_line_gives_the_same_loss(
    data: Path, weights: Path, plain_loss: float, tmp_path: Path
) -> None:
    assert recorded(one_step(data, weights), tmp_path / "run")["history"]["loss"][0] == plain_loss


def one_step(data: Path, weights: Path) -> list[str]:
    flags = [
        "--num-steps",
        "1",
        "--batch-size",
        "4",
        "--eval-limit",
        "1",
        "--macs",
        "0.7",
        "--no-tensorboard",
    ]
    return ["finetune", *MODEL, "--checkpoint", str(weights), "--data", str(data), *flags]


@pytest.fixture(scope="module")
def plain_loss(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """The loss of one step without any of the flags."""
    record = recorded(one_step(data, weights), tmp_path_factory.mktemp("plain") / "run")
    return float(record["history"]["loss"][0])


def test_every_augmentation_option_has_its_place() -> None:
    options = AugmentationOptions(
        random_crop=False,
        crop_scale=(0.2, 0.9),
        flip=0.1,
        color_jitter=0.3,
        random_erasing=0.4,
        mixup=0.5,
        cutmix=0.6,
        mix_probability=0.7,
        mix_switch=0.8,
    )
    assert options.of_image() == Augmentation(
        random_resized_crop=False,
        scale=(0.2, 0.9),
        flip=0.1,
        color_jitter=0.3,
        random_erasing=0.4,
    )
    assert options.of_batch() == Mixing(mixup=0.5, cutmix=0.6, probability=0.7, switch_probability=0.8)


def test_each_split_serves_its_purpose(data: Path, weights: Path, tmp_path: Path) -> None:
    """12 images to train on, 6 to evaluate on; limits apply to one of the two."""
    asked = [*one_step(data, weights), "--eval-limit", "100"]
    record = recorded(asked, tmp_path / "all")
    assert record["facts"]["train_images"].startswith("12 (")
    assert record["facts"]["eval_images"].startswith("6 (")
    assert record["final"]["images"] == 6
    assert recorded(asked, tmp_path / "few", "--train-limit", "3")["facts"]["train_images"].startswith("3 (")


def test_a_resumed_run_keeps_the_points_before_its_checkpoint(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--num-steps", "4", "--checkpoint-every", "2", "--macs", "0.7"]

    def stop(bar: Any, logs: Any) -> None:
        if logs[-1].step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cpvit.finetune.progress.ProgressBar.on_steps", stop)
        assert main(arguments(data, weights, tmp_path / "run", *flags)) == 130
    assert main(arguments(data, weights, tmp_path / "run", *flags, "--resume")) == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(record["history"]["loss"])
    assert [event.step for event in events.Scalars("eval/top1")] == [4]


def test_every_process_gets_its_share_of_the_images(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Any, Any]] = []

    def keep(model: Any, train: Any, evaluation: Any, *rest: Any, **options: Any) -> None:
        given.append((train, evaluation))
        raise KeyboardInterrupt

    monkeypatch.setattr("cpvit.commands.finetune.finetune", keep)
    for rank in (0, 1):
        monkeypatch.setattr(Processes, "rank", rank)
        monkeypatch.setattr(Processes, "world_size", 2)
        asked = [*one_step(data, weights), "--no-random-crop", "--flip", "0", "--eval-limit", "100"]
        assert main([*asked, "--output-dir", str(tmp_path / str(rank))]) == 130
    evaluated = [image for _, batches in given for batch in batches for image in batch.images]
    assert len(evaluated) == 6
    assert len({image.sum().item() for image in evaluated}) == 6, "every image once"
    trained = [image for batches, _ in given for image in next(batches.starting_at(0)).images]
    assert len({image.sum().item() for image in trained}) == 8, "two batches of four"
