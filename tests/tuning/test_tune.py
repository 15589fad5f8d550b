"""From a budget or an accuracy to a plan: reached, reproducible, resumable."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_images, tiny_vit

from cpvit import prune_
from cpvit.plans.macs import count_macs
from cpvit.tuning.checkpoint import SearchCheckpoint
from cpvit.tuning.target import Target
from cpvit.tuning.tune import TuneOptions, tune


def images(count: int = 6) -> torch.Tensor:
    return random_images(count, seed=4)


def square_images() -> torch.Tensor:
    return torch.randn(6, 3, 112, 112, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("method", ["cpvit", "cpvit-merge", "tome"])
def test_the_plan_meets_the_budget_and_applies_in_one_call(method: str) -> None:
    model = tiny_vit(depth=4)
    dense, expected = count_macs(model), model(images())
    tuned = tune(model, images(), Target(macs=0.6), TuneOptions(method=method, trials=12))
    assert torch.equal(model(images()), expected), "the model is left untouched"
    assert tuned.distance <= tuned.start_distance
    assert (tuned.plan.schedule, tuned.plan.method, tuned.plan.calibration_images) == ("search", method, 6)
    prune_(model, tuned.plan)
    assert count_macs(model) / dense == pytest.approx(0.6, rel=0.005)
    assert tuned.plan.macs_ratio == pytest.approx(count_macs(model) / dense, abs=1e-6)


def test_it_is_reproducible_by_seed() -> None:
    plans = [
        tune(tiny_vit(depth=4), images(), Target(macs=0.6), TuneOptions(trials=12, seed=5)).plan
        for _ in range(2)
    ]
    assert plans[0] == plans[1]


def test_an_interrupted_search_goes_on_and_ends_where_it_would_have(tmp_path: Path) -> None:
    memory, judged = tmp_path / "plan.json.search", []

    def interrupt(count: int, best: float) -> None:
        judged.append(count)
        if count == 5:
            raise KeyboardInterrupt

    whole = tune(tiny_vit(depth=4), images(), Target(macs=0.6), TuneOptions(trials=12))
    with pytest.raises(KeyboardInterrupt):
        tune(
            tiny_vit(depth=4),
            images(),
            Target(macs=0.6),
            TuneOptions(trials=12),
            checkpoint=memory,
            on_trial=interrupt,
        )
    known = json.loads(memory.read_text())["known"]
    assert len(known) == 5
    resumed = tune(tiny_vit(depth=4), images(), Target(macs=0.6), TuneOptions(trials=12), checkpoint=memory)
    assert resumed == whole
    assert not memory.exists(), "a finished search leaves nothing behind"


def test_a_memory_of_another_question_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "plan.json.search"
    path.write_text(json.dumps({"key": "another", "known": {"1 1 1": 0.0}}))
    assert SearchCheckpoint(path, "this").known == {}
    assert SearchCheckpoint(path, "another").known == {"1 1 1": 0.0}


def test_a_file_that_is_no_memory_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "plan.json.search"
    path.write_text("precious")
    with pytest.raises(ValueError, match=r"is not the memory of a search; delete it to start anew"):
        tune(tiny_vit(), images(), Target(macs=0.6), TuneOptions(trials=3), checkpoint=path)
    assert path.read_text() == "precious"


def test_agreement_is_held_at_the_least_macs_found() -> None:
    model = tiny_vit(img_size=(112, 112))
    tuned = tune(model, square_images(), Target(min_agreement=0.6), TuneOptions(trials=4))
    assert tuned.agreement >= 0.6
    assert 0.3 <= tuned.plan.macs_ratio < 0.97


def test_a_drop_is_held_on_labelled_images() -> None:
    model = tiny_vit(img_size=(112, 112))
    labels = model(square_images()).argmax(dim=1)
    tuned = tune(model, square_images(), Target(max_drop=40.0), TuneOptions(trials=4), labels=labels)
    assert tuned.drop is not None
    assert tuned.drop <= 40
    assert tuned.plan.macs_ratio < 0.97


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, r"give one of macs, max_drop, min_agreement and speedup, got none"),
        ({"macs": 0.6, "max_drop": 1.0}, r"got macs and max_drop"),
        ({"macs": 1.2}, r"macs must be a fraction above 0 and at most 1, got 1.2"),
        ({"max_drop": -1.0}, r"max_drop is a loss in points and must be at least 0, got -1.0"),
        ({"min_agreement": 99.0}, r"min_agreement must be a fraction from 0 to 1, got 99.0"),
    ],
)
def test_an_impossible_target_is_refused(target: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target(**target)


def test_a_drop_needs_labels() -> None:
    with pytest.raises(ValueError, match=r"max_drop needs labels: give labelled calibration images"):
        tune(tiny_vit(), images(), Target(max_drop=1.0))


def test_a_target_that_cannot_be_held_says_how_far_off_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpvit.tuning.tune.agreement", lambda *_: 0.75)
    with pytest.raises(ValueError, match=r"agreement is 0.7500 \(at least 1.0 wanted\) at macs=0.97"):
        tune(tiny_vit(img_size=(112, 112)), square_images(), Target(min_agreement=1.0), TuneOptions(trials=2))


def test_without_a_classification_head_there_is_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match=r"has no classification head to compare predictions of"):
        tune(tiny_vit(num_classes=1), images(), Target(macs=0.6), TuneOptions(trials=2))


def test_heads_that_do_nothing_are_the_ones_to_go_and_the_plan_is_corrected() -> None:
    model = tiny_vit(depth=4)
    idle = [(0, 3), (1, 1), (1, 4), (3, 0)]
    with torch.no_grad():
        for block, head in idle:
            model.blocks[block].attn.proj.weight[:, 6 * head : 6 * head + 6] = 0
    dense = model(images())
    tuned = tune(model, images(), Target(macs=0.85), TuneOptions(head_keep_rate=0.8, trials=3))
    assert tuned.plan.heads == ((0, 1, 2, 4), (0, 2, 3), (0, 1, 2, 3, 4), (1, 2, 3, 4))
    assert tuned.plan.head_correction
    assert torch.equal(model(images()), dense), "the model is left untouched"
    prune_(model, tuned.plan, calibration=images())
    assert count_macs(model) < 0.86 * count_macs(tiny_vit(depth=4))


def test_the_papers_choice_of_heads_is_the_cascade() -> None:
    plan = tune(
        tiny_vit(depth=4),
        images(),
        Target(macs=0.6),
        TuneOptions(head_keep_rate=0.6, head_choice="cascade", trials=2),
    ).plan
    assert plan.heads is not None
    assert not plan.head_correction
    assert all(set(later) <= set(earlier) for earlier, later in itertools.pairwise(plan.heads))
