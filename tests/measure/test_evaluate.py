"""The numbers of an evaluation, by hand; and that both passes see the same images."""

from __future__ import annotations

import dataclasses
import math
import tarfile
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from conftest import add_member, tiny_vit
from torch import Tensor

from cpvit import PruneConfig, calibrate, plan_of
from cpvit.adapters import open_host
from cpvit.data import BadImageError, Batches, Preprocessing, find_samples, label_map, make_loader
from cpvit.machine.device import choose_device, choose_dtype
from cpvit.machine.environment import describe_environment
from cpvit.measure.evaluate import evaluate, predict
from cpvit.measure.metrics import Predictions, agreement, kl_divergence, logit_distance
from cpvit.measure.outcomes import outcomes, right
from cpvit.plans.macs import count_macs

HALF = (0.5, 0.5, 0.5)


def predictions(probs: list[list[float]], labels: list[int]) -> Predictions:
    return Predictions(torch.tensor(probs).log(), torch.tensor(labels))


DENSE = predictions([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]], [0, 1, 0])
PRUNED = predictions([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1], [0.3, 0.1, 0.6]], [0, 1, 0])


def test_top_k_is_the_percentage_of_images_with_their_label_among_the_k_likeliest() -> None:
    assert DENSE.top(1) == pytest.approx(200 / 3)
    assert PRUNED.top(1) == pytest.approx(100 / 3)
    assert DENSE.top(2) == pytest.approx(200 / 3)
    assert PRUNED.top(2) == pytest.approx(100)


def test_top_5_of_fewer_classes_is_all_of_them() -> None:
    assert DENSE.top(5) == 100


def test_agreement_is_the_share_of_equal_predictions() -> None:
    assert agreement(DENSE, PRUNED) == pytest.approx(2 / 3)
    assert agreement(DENSE, DENSE) == 1


def test_kl_is_of_the_pruned_from_the_dense_distribution() -> None:
    first = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    third = 0.1 * math.log(0.1 / 0.3) + 0.3 * math.log(0.3 / 0.1)
    assert kl_divergence(DENSE, PRUNED) == pytest.approx((first + third) / 3, rel=1e-6)
    assert kl_divergence(DENSE, DENSE) == 0


def batches(tar: Path, **options: Any) -> Batches:
    source = find_samples(tar)
    labels = options.pop("labels", label_map(source, 3) if options.pop("labelled", True) else None)
    preprocessing = Preprocessing((40, 56), HALF, HALF)
    return make_loader(source, preprocessing, labels=labels, batch_size=5, **options)


@pytest.fixture
def small() -> Any:
    return tiny_vit(num_classes=3).float()


def test_an_evaluation_compares_both_models_on_the_same_images(small: Any, tiny_tar: Path) -> None:
    result = evaluate(small, batches(tiny_tar), PruneConfig(keep_per_block=(30, 20, 9)), seed=7)
    assert result.images == 12
    assert result.images_skipped == 0
    assert result.dense.macs == count_macs(small)
    assert result.macs_ratio == result.pruned.macs / result.dense.macs < 0.8
    assert result.pruned.tokens_per_block == (31, 21, 10)
    assert result.pruned.heads_per_block == (5, 5, 5)
    assert result.pruned.params == result.dense.params == sum(p.numel() for p in small.parameters())
    assert 0 <= result.agreement <= 1
    assert result.kl > 0
    assert result.dense.top5 == 100
    assert result.environment.seed == 7
    assert result.environment.dtype == "float32"
    assert plan_of(small) is None


def test_accuracy_is_that_of_the_models_own_logits(small: Any, tiny_tar: Path) -> None:
    data = batches(tiny_tar)
    result = evaluate(small, data, PruneConfig(keep_rate=1.0))
    with torch.inference_mode():
        hits = [(small(b.images).argmax(1) == b.labels).double() for b in data]
    assert result.dense.top1 == result.pruned.top1 == pytest.approx(100 * torch.cat(hits).mean().item())
    assert result.agreement == 1
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.macs_ratio == 1


def test_cut_heads_show_in_the_parameters(small: Any, tiny_tar: Path) -> None:
    statistics = calibrate(small, (batch.images for batch in batches(tiny_tar)))
    result = evaluate(small, batches(tiny_tar), PruneConfig(head_keep_rate=0.4), calibration=statistics)
    assert result.pruned.heads_per_block == (4, 3, 2)
    assert result.pruned.params < result.dense.params
    assert result.plan.schedule == "layer-aware"


def test_progress_is_told_of_both_passes_and_their_lengths(small: Any, tiny_tar: Path) -> None:
    told = []

    def progress(items: Any, title: str, total: int) -> Any:
        told.append((title, total))
        return items

    evaluate(small, batches(tiny_tar), PruneConfig(keep_rate=0.5), progress=progress)
    assert told == [("dense", 3), ("pruned", 3)]


def test_images_that_cannot_be_read_are_counted_and_named(small: Any, tiny_tar: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.tar"
    with tarfile.open(tiny_tar) as whole, tarfile.open(path, "w") as archive:
        for member in whole.getmembers():
            add_member(archive, member.name, whole.extractfile(member).read())
        add_member(archive, "bee/broken.png", b"no image")
    with pytest.raises(BadImageError, match=r"broken\.png"):
        evaluate(small, batches(path), PruneConfig(keep_rate=0.5))
    assert plan_of(small) is None
    result = evaluate(small, batches(path, skip_bad_images=True), PruneConfig(keep_rate=0.5))
    assert (result.images, result.images_skipped) == (12, 1)
    assert "broken.png" in result.skipped[0]


def test_images_without_labels_are_refused(small: Any, tiny_tar: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation needs labels; build the loader with labels=label_map"):
        predict(open_host(small), batches(tiny_tar, labelled=False))


@pytest.mark.parametrize("training", [False, True])
def test_evaluating_leaves_the_model_as_it_was(small: Any, tiny_tar: Path, training: bool) -> None:
    small.train(training)
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    evaluate(small, batches(tiny_tar), PruneConfig(keep_rate=0.5))
    assert small.training == training
    assert all(torch.equal(tensor, state[name]) for name, tensor in small.state_dict().items())


def test_a_record_holds_plain_values_only(small: Any, tiny_tar: Path) -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return all(plain(item) for item in value)
        return value is None or isinstance(value, (str, int, float, bool))

    assert plain(dataclasses.asdict(evaluate(small, batches(tiny_tar))))


def test_half_precision_is_compared_in_float32(tiny_tar: Path) -> None:
    model = tiny_vit(num_classes=3).bfloat16()
    log_probs: Tensor = predict(open_host(model), batches(tiny_tar)).log_probs
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(12))


def test_the_environment_says_where_a_number_was_measured() -> None:
    found = describe_environment(torch.device("cpu"), torch.bfloat16, 3)
    assert (found.device, found.dtype, found.seed) == ("cpu", "bfloat16", 3)
    assert found.threads == torch.get_num_threads()
    assert found.device_name
    assert found.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "timm", "torchvision"} <= set(found.versions)


def test_devices_and_dtypes_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    assert choose_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match=r"device must be auto, cpu, cuda, cuda:1 ..., got 'abacus'"):
        choose_device("abacus")
    with pytest.raises(ValueError, match=r"device 'cuda:1' was asked for and torch sees no CUDA device here"):
        choose_device("cuda:1")
    with pytest.raises(ValueError, match=r"dtype must be one of float32, bfloat16, .*, got 'int8'"):
        choose_dtype("int8")


def test_accuracy_needs_labels() -> None:
    with pytest.raises(ValueError, match="accuracy needs labels; these images have none"):
        Predictions(DENSE.log_probs).top(1)


def test_logit_distance_ignores_a_constant_and_tells_scale_from_direction() -> None:
    logits = torch.tensor([[3.0, 0.0, -3.0], [1.0, 1.0, -2.0]])
    dense = Predictions(logits.log_softmax(dim=1))
    assert logit_distance(dense, Predictions(logits + 5)) == pytest.approx(0, abs=1e-9)
    assert logit_distance(dense, Predictions(-logits)) == pytest.approx(4)
    assert logit_distance(dense, Predictions(torch.zeros(2, 3))) == pytest.approx(2)
    halved = logit_distance(dense, Predictions((logits / 2).log_softmax(dim=1)))
    assert halved == pytest.approx(0.25 / ((1 + 0.25) / 2))
    swapped = logit_distance(Predictions((logits / 2).log_softmax(dim=1)), dense)
    assert swapped == pytest.approx(halved), "neither side is the reference"


def test_logit_distance_of_two_equal_rows_is_finite() -> None:
    flat = Predictions(torch.zeros(1, 4).log_softmax(dim=1))
    assert logit_distance(flat, flat) == 0


def test_outcomes_say_of_each_image_what_happened() -> None:
    dense = Predictions(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]).log(), torch.tensor([0, 1, 1]))
    pruned = Predictions(torch.tensor([[0.8, 0.2], [0.7, 0.3], [0.3, 0.7]]).log(), torch.tensor([0, 1, 1]))
    found = outcomes(dense, pruned)
    assert (right(dense), found.right, found.agrees) == ("110", "101", "100")
    divergences = [
        sum(p * math.log(p / q) for p, q in zip(a, b, strict=True))
        for a, b in (((0.9, 0.1), (0.8, 0.2)), ((0.2, 0.8), (0.7, 0.3)), ((0.6, 0.4), (0.3, 0.7)))
    ]
    assert found.kl_error == pytest.approx(stdev(divergences) / 3**0.5, rel=1e-5)


def test_outcomes_add_up_to_the_figures(small: Any, tiny_tar: Path) -> None:
    result = evaluate(small, batches(tiny_tar), PruneConfig(method="cpvit-merge", macs=0.6))
    assert len(result.outcomes.right) == len(result.dense_right) == result.images
    assert result.outcomes.right.count("1") / result.images == pytest.approx(result.pruned.top1 / 100)
    assert result.outcomes.agrees.count("1") / result.images == pytest.approx(result.agreement)


def test_outcomes_need_labels() -> None:
    predictions = Predictions(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="these images have none"):
        right(predictions)
