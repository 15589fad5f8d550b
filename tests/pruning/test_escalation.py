"""Two stages: the unsure images run again, exactly as they would alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_images, tiny_vit
from torch import Tensor

from cpvit import Plan, PruneConfig, prune_, unprune_
from cpvit.plans.escalation import Escalation, load_plan
from cpvit.plans.macs import count_macs
from cpvit.pruning.cascade import SharedBlocks, sharing
from cpvit.pruning.escalation import ForcedShare, escalate, escalate_host, mean_macs, prediction_margin
from cpvit.pruning.opening import open_restored

COUNTS = (35, 20, 8)


def plan_of_counts(model: Any, counts: tuple[int, ...] = COUNTS, method: str = "cpvit-merge") -> Plan:
    plan = prune_(model, PruneConfig(method=method, keep_per_block=counts), verify=False)
    unprune_(model)
    return plan


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def setup(any_model: Any) -> tuple[Any, Plan, Tensor]:
    return any_model, plan_of_counts(any_model), random_images(9)


def logits_under(model: Any, plan: Plan, images: Tensor) -> Tensor:
    prune_(model, plan, verify=False)
    logits: Tensor = model(images)
    unprune_(model)
    return logits


def test_unsure_images_get_the_dense_answer_and_sure_ones_the_light_one(
    setup: tuple[Any, Plan, Tensor],
) -> None:
    model, plan, images = setup
    light, dense = logits_under(model, plan, images), model(images)
    margins = prediction_margin(light)
    margin = float(margins.sort().values[4])
    got = escalate(model, Escalation(plan, None, margin))(images)
    unsure = margins < margin
    assert 0 < int(unsure.sum()) < len(images)
    torch.testing.assert_close(got[unsure], dense[unsure], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[~unsure], light[~unsure], rtol=1e-9, atol=1e-9)


def test_a_second_plan_answers_for_unsure_images(setup: tuple[Any, Plan, Tensor]) -> None:
    model, plan, images = setup
    gentle = plan_of_counts(model, (35, 34, 30))
    got = escalate(model, Escalation(plan, gentle, 1.0))(images)
    torch.testing.assert_close(got, logits_under(model, gentle, images), rtol=1e-9, atol=1e-9)


def test_an_image_alone_is_answered_as_in_a_batch(setup: tuple[Any, Plan, Tensor]) -> None:
    model, plan, images = setup
    margin = float(prediction_margin(logits_under(model, plan, images)).median()) + 1e-6
    fast = escalate(model, Escalation(plan, None, margin))
    alone = torch.cat([fast(image[None]) for image in images])
    torch.testing.assert_close(fast(images), alone, rtol=1e-9, atol=1e-9)


def test_margins_at_the_ends_run_one_stage_only(setup: tuple[Any, Plan, Tensor]) -> None:
    model, plan, images = setup
    nobody, everybody = (escalate(model, Escalation(plan, None, margin)) for margin in (0.0, 1.0))
    nobody.second_model.forward = lambda *_: pytest.fail("ran again")
    torch.testing.assert_close(nobody(images), logits_under(model, plan, images))
    torch.testing.assert_close(everybody(images), model(images), rtol=1e-9, atol=1e-9)


def test_shared_blocks_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit(depth=4)
    plan = plan_of_counts(model, (35, 35, 20, 8))
    ran: list[int] = []
    from cpvit.pruning import cascade

    real = cascade.run_block

    def counting(*args: Any, **kwargs: Any) -> Any:
        ran.append(len(args[3]))
        return real(*args, **kwargs)

    monkeypatch.setattr(cascade, "run_block", counting)
    fast = escalate(model, Escalation(plan, None, 1.0), verify=False)
    assert fast.escalation.shared_blocks == 2
    fast(random_images(3))
    assert ran == [3] * 4 + [3] * 2


def test_the_model_itself_is_left_alone_and_shares_its_weights(setup: tuple[Any, Plan, Tensor]) -> None:
    model, plan, images = setup
    before = model(images)
    fast = escalate(model, Escalation(plan, None, 0.5))
    assert torch.equal(model(images), before)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in fast.parameters()} <= own


def test_a_compiled_model_answers_alike(model: Any, images: Tensor) -> None:
    plan = plan_of_counts(model)
    margin = float(prediction_margin(logits_under(model, plan, images)).median()) + 1e-6
    fast = escalate(model, Escalation(plan, None, margin))
    expected = fast(images)
    torch.testing.assert_close(torch.compile(fast, backend="eager")(images), expected)


def test_sharing_ends_with_the_forward(model: Any, images: Tensor) -> None:
    plan = plan_of_counts(model)
    prune_(model, plan, verify=False)
    expected = model(images)
    with pytest.raises(RuntimeError, match="stop"), sharing(SharedBlocks(1)):
        raise RuntimeError("stop")
    assert torch.equal(model(images), expected)


def test_the_forced_share_is_the_least_sure(model: Any) -> None:
    images = random_images(8)
    plan = plan_of_counts(model)
    host = open_restored(model)
    fast = escalate_host(host, Escalation(plan, None, 0.0, share=0.25), kind=ForcedShare)
    light, dense = logits_under(model, plan, images), model(images)
    least = prediction_margin(light).argsort()[:2]
    got = fast(images)
    torch.testing.assert_close(got[least], dense[least], rtol=1e-9, atol=1e-9)
    others = [image for image in range(8) if image not in least.tolist()]
    torch.testing.assert_close(got[others], light[others], rtol=1e-9, atol=1e-9)


def test_mean_macs_are_what_the_stages_cost_less_what_they_share() -> None:
    model = tiny_vit(depth=4)
    plan = plan_of_counts(model, (35, 35, 20, 8))
    host = open_restored(model)
    pair = Escalation(plan, None, 0.5)
    dense = count_macs(model)
    block = host.blocks[0].costs().macs(36, 36)
    assert mean_macs(host, pair, 0.0) == plan.macs_ratio
    assert mean_macs(host, pair, 0.5) == pytest.approx(plan.macs_ratio + 0.5 * (1 - 2 * block / dense))


def test_files_hold_everything(tmp_path: Path) -> None:
    model = tiny_vit()
    for second in (None, plan_of_counts(model, (35, 30, 30))):
        pair = Escalation(plan_of_counts(model), second, 0.25, 0.1, 0.7)
        pair.save(tmp_path / "pair.json")
        assert load_plan(tmp_path / "pair.json") == pair
    plan_of_counts(model).save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan_of_counts(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"escalation": 2}, "escalation version 2 is newer than this cpvit reads"),
        ({"margin": 2}, "margin is a difference of probabilities from 0 to 1, got 2"),
        ({"light": {}}, "not a plan: expected an object with patches_per_block"),
        ({"surprise": 1}, "unexpected keyword argument 'surprise'"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    pair = Escalation(plan_of_counts(tiny_vit()), None, 0.25)
    file = tmp_path / "pair.json"
    file.write_text(json.dumps({**json.loads(pair.to_json()), **change}))
    with pytest.raises(ValueError, match=words) as caught:
        load_plan(file)
    assert str(file) in str(caught.value)


def test_two_plans_must_be_for_one_model() -> None:
    plan, other = plan_of_counts(tiny_vit()), plan_of_counts(tiny_vit("registers"))
    with pytest.raises(ValueError, match="both plans must be for one model"):
        Escalation(plan, other, 0.5)


def test_projections_that_need_calibration_images_are_not_left_out_silently() -> None:
    model = tiny_vit()
    plan = dataclasses.replace(plan_of_counts(model), heads=((0, 1, 2),) * 3, head_correction=True)
    with pytest.raises(ValueError, match=r"corrects the projections .* which needs calibration images"):
        escalate(model, Escalation(plan, None, 0.5))
