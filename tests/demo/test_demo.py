"""The demo: train and test digits are disjoint, the packaged model has its stated accuracy, and one full run."""

from importlib import resources
from pathlib import Path

import pytest
import torch

from cpvit.demo import cluttered_digits, describe, digits_model, load_digits_model, run_demo
from cpvit.demo import digits as digits_module
from cpvit.demo.digits import GRID, WEIGHTS, to_unit, weights_metadata
from cpvit.demo.train import TrainingConfig, accuracy_percent, forward_window, save_weights, train_digits
from cpvit.pictures.survivors import stages


def test_images_are_the_same_every_time_and_change_with_the_seed() -> None:
    first, again = cluttered_digits("test", count=7, seed=3), cluttered_digits("test", count=7, seed=3)
    other, _ = cluttered_digits("test", count=7, seed=4)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], other)


def test_images_are_normalised_and_full_size() -> None:
    images, labels = cluttered_digits("train", count=5, seed=0)
    assert images.shape == (5, 3, 96, 96)
    assert images.dtype == torch.float32
    assert labels.shape == (5,)
    assert -1 <= images.min() < -0.4
    assert 0.3 < images.max() <= 1
    assert 0 <= to_unit(images).min() < to_unit(images).max() <= 1


def test_no_scan_is_in_both_splits() -> None:
    train, _ = digits_module._scans("train")
    test, _ = digits_module._scans("test")
    assert len(train) + len(test) == 1797
    assert not {scan.numpy().tobytes() for scan in train} & {scan.numpy().tobytes() for scan in test}


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_digit_is_about_as_frequent(split: digits_module.Split) -> None:
    _, labels = digits_module._scans(split)
    shares = labels.bincount(minlength=10) / len(labels)
    assert shares.min() > 0.095
    assert shares.max() < 0.105


def test_every_scan_is_drawn_once_before_any_is_drawn_again() -> None:
    _, scan_labels = digits_module._scans("test")
    _, labels = cluttered_digits("test", seed=5, side=32)
    _, twice = cluttered_digits("test", count=2 * len(labels), seed=5, side=32)
    assert torch.equal(labels.bincount(), scan_labels.bincount())
    assert torch.equal(twice.bincount(), 2 * scan_labels.bincount())


def test_brightness_does_not_give_the_digit_away() -> None:
    """Were the digit the brightest thing, the 16 brightest patches would be the 16 that hold it."""
    random = torch.Generator().manual_seed(0)
    scans, _ = digits_module._scans("test")
    order, corner = torch.arange(60), torch.full((60, 2), 32)
    ink = digits_module._compose(scans, order, corner, 96, random)
    brightest = (
        ink.unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(3, 4)).flatten(1).argsort(dim=1, descending=True)
    )
    row, column = brightest[:, :16] // GRID, brightest[:, :16] % GRID
    on_digit = ((row >= 4) & (row < 8) & (column >= 4) & (column < 8)).double().mean()
    assert on_digit < 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "split must be 'train' or 'test', got 'val'"),
        ({"split": "test", "count": 0}, "count must be at least 1.*got 0"),
        ({"split": "test", "side": 50}, "side must be a multiple of 8 and at least 32 pixels, got 50"),
        ({"split": "test", "side": 24}, "at least 32 pixels, got 24"),
    ],
)
def test_impossible_canvases_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluttered_digits(**arguments)  # type: ignore[arg-type]


def test_weights_are_small_and_say_how_they_were_made() -> None:
    assert len((resources.files("cpvit.demo") / WEIGHTS).read_bytes()) <= 3_000_000
    metadata = weights_metadata()
    assert metadata["command"].startswith("python -m cpvit.demo.train --output digits.safetensors")
    assert float(metadata["test_accuracy_percent"]) >= 95


def test_packaged_model_is_as_accurate_as_it_says() -> None:
    images, labels = cluttered_digits("test", count=200, seed=1)
    accuracy = accuracy_percent(load_digits_model(), images, labels)
    # Three points are two standard errors of 200 images at 96%; other clutter, other poses.
    assert accuracy >= float(weights_metadata()["test_accuracy_percent"]) - 3


def test_training_forward_on_a_full_canvas_is_the_models_own() -> None:
    model = load_digits_model().double()
    images = cluttered_digits("test", count=3, seed=0)[0].double()
    with torch.inference_mode():
        torch.testing.assert_close(forward_window(model, images, row=0, column=0), model(images))


def test_training_runs_and_its_weights_load(tmp_path: Path) -> None:
    seen: list[int] = []
    model = train_digits(
        TrainingConfig(small_epochs=1, full_epochs=0, small_window=4, batch=240),
        progress=lambda epoch, loss: seen.append(epoch) if 2 < loss < 3 else None,
    )
    assert seen == [1]
    save_weights(model, tmp_path / "weights.safetensors", {"command": "none"})
    from safetensors.torch import load_file

    digits_model().load_state_dict(load_file(tmp_path / "weights.safetensors"))


def test_a_configuration_without_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one must be trained, got 0 small and 0 full"):
        TrainingConfig(small_epochs=0, full_epochs=0)


def test_demo_prunes_half_and_hardly_errs_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpvit.demo.run._SECONDS", 0.1)
    result = run_demo(tmp_path / "demo.png", images=120)
    assert result.plan.patches_per_block[-1] == 72
    assert result.plan.schedule == "layer-aware"
    assert result.macs_ratio < 0.85
    assert result.speedup > 0
    assert result.pruned_accuracy_percent >= result.dense_accuracy_percent - 3
    assert result.agreement_percent >= 95
    assert result.picture.stat().st_size > 50_000
    assert len(stages(result.plan.patches_per_block, 144)) > 1
    text = describe(result)
    assert "120 digits never trained on" in text
    assert str(result.picture) in text
