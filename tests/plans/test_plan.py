"""What may be asked for, what it becomes for a model, and that a plan survives being written down."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_vit
from torch import Tensor

from cpvit import Calibration, Plan, PruneConfig, prune_

CALIBRATION = Calibration(8, (1.0, 1.2, 2.0), ((1.0, 5.0, 3.0, 2.0, 4.0),) * 3)


def plan_for(**dials: Any) -> Plan:
    return prune_(tiny_vit(), PruneConfig(**dials), verify=False)


@pytest.mark.parametrize(
    ("dials", "words"),
    [
        (
            {"keep_rate": 0.5, "macs": 0.5},
            r"give one of keep_rate, macs and keep_per_block, not keep_rate and macs",
        ),
        ({"macs": 0.5, "keep_per_block": (1,)}, r"not macs and keep_per_block"),
        ({"keep_rate": 0}, r"keep_rate must be a fraction above 0 and at most 1, got 0"),
        ({"keep_rate": 1.5}, r"keep_rate must be a fraction above 0 and at most 1, got 1.5"),
        ({"macs": -1}, r"macs must be a fraction above 0 and at most 1, got -1"),
        ({"macs": float("nan")}, r"macs must be a fraction above 0 and at most 1, got nan"),
        ({"head_keep_rate": 0.0}, r"head_keep_rate must be a fraction above 0 and at most 1, got 0.0"),
        ({"head_mode": "cut"}, r"head_mode must be one of slice, mask, got 'cut'"),
        ({"schedule": "cosine"}, r"schedule must be one of auto, curve, linear-ramp, .*, got 'cosine'"),
        ({"keep_per_block": ()}, r"keep_per_block is empty; give one value per block"),
        ({"keep_per_block": (30, 0.5)}, r"mixes numbers of patches \(int\) and fractions \(float\)"),
        ({"keep_per_block": (10, 20)}, r"must never rise \(a patch that left cannot come back\)"),
        ({"keep_per_block": (10, 0)}, r"fractions in \(0, 1\] or numbers of patches >= 1"),
        ({"keep_per_block": (1.5, 0.5)}, r"fractions in \(0, 1\] or numbers"),
        (
            {"keep_per_block": ("a", "b")},
            r"must hold fractions or whole numbers of patches, got \('a', 'b'\)",
        ),
        ({"keep_per_block": (True, True)}, r"must hold fractions or whole numbers of patches"),
        (
            {"keep_per_block": (9, 8), "schedule": "constant"},
            r"a schedule of its own; leave out schedule='constant'",
        ),
        ({"align": 0}, r"align must be a number of tokens of at least 1, auto or none, got 0"),
        ({"align": 2.5}, r"align must be a number of tokens of at least 1, auto or none, got 2.5"),
        ({"align": True}, r"align must be a number .*, got True"),
        ({"align": "often"}, r"align must be a number .*, got 'often'"),
        ({"keep_per_block": (9, 8), "align": 4}, r"keep_per_block is taken as it is; leave out align=4"),
    ],
)
def test_a_configuration_without_sense_is_refused(dials: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PruneConfig(**dials)


@pytest.mark.parametrize(
    ("dials", "words"),
    [
        ({"method": "magic"}, r"method must be one of cpvit.*, got 'magic'"),
        ({"keep_per_block": (30, 20)}, r"has 2 entries but vit_tiny_patch16_224 has 3 blocks; give 3"),
        (
            {"keep_per_block": (36, 20, 9)},
            r"keeps 36 patches but vit_tiny_patch16_224 has 35; give at most that",
        ),
        (
            {"macs": 0.01},
            r"macs=0.01 cannot be met .* can spend from 0\.\d+ to 1 of its dense .*choose a value",
        ),
        (
            {"schedule": "layer-aware"},
            r"give calibration images, or use schedule='linear-ramp', which needs none",
        ),
        (
            {"method": "tome", "head_keep_rate": 0.5, "head_mode": "mask"},
            r"head_mode='mask' needs the method cpvit \(it scores every block\), got 'tome'",
        ),
        ({"head_keep_rate": 0.5}, r"head_keep_rate=0.5 needs calibration images.*or head_mode='mask'"),
    ],
)
def test_a_configuration_that_does_not_fit_the_model_is_refused(dials: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_for(**dials)


def test_the_head_cascade_needs_as_many_heads_in_every_block() -> None:
    model = tiny_vit()
    attn = model.blocks[1].attn
    attn.num_heads, attn.head_dim, attn.scale = 3, 10, 10**-0.5
    with pytest.raises(ValueError, match=r"needs the same number of heads in every block, got \[3, 5\]"):
        prune_(model, PruneConfig(head_keep_rate=0.5), calibration=CALIBRATION)
    prune_(model, PruneConfig(keep_rate=0.5))


def test_patches_may_be_given_as_numbers_or_fractions() -> None:
    assert plan_for(keep_per_block=(30, 20, 9)).patches_per_block == (30, 20, 9)
    assert plan_for(keep_per_block=(1.0, 0.5, 0.01)).patches_per_block == (35, 18, 1)


def test_a_keep_rate_is_met_at_the_end() -> None:
    assert plan_for(keep_rate=0.4).patches_per_block[-1] == 14
    assert plan_for(keep_rate=0.001).patches_per_block[-1] == 1
    assert plan_for(keep_rate=1).patches_per_block == (35, 35, 35)


def test_only_a_fixed_number_of_patches_leaves_with_the_constant_schedule() -> None:
    assert plan_for(keep_rate=20 / 35, schedule="constant").patches_per_block == (30, 25, 20)


@pytest.mark.parametrize(
    ("dials", "dial", "schedule"),
    [
        ({}, "keep_rate=0.5 (default)", "linear-ramp"),
        ({"macs": 0.6}, "macs=0.6", "curve"),
        ({"keep_rate": 0.3, "schedule": "constant"}, "keep_rate=0.3", "constant"),
        ({"keep_per_block": (9, 9, 9)}, "keep_per_block", "explicit"),
        (
            {"head_keep_rate": 0.6, "head_mode": "mask"},
            "keep_rate=0.5 (default), head_keep_rate=0.6",
            "linear-ramp",
        ),
    ],
)
def test_a_plan_says_what_was_asked_for(dials: dict[str, Any], dial: str, schedule: str) -> None:
    plan = plan_for(**dials)
    assert (plan.dial, plan.schedule) == (dial, schedule)


def test_calibration_makes_the_schedule_layer_aware() -> None:
    plan = prune_(tiny_vit(), PruneConfig(keep_rate=0.4), calibration=CALIBRATION)
    assert (plan.schedule, plan.calibration_images) == ("layer-aware", 8)
    assert plan.patches_per_block[-1] == 14


def test_cut_heads_follow_the_cumulative_scores_of_the_calibration() -> None:
    plan = prune_(tiny_vit(), PruneConfig(head_keep_rate=0.4), calibration=CALIBRATION)
    assert plan.heads == ((1, 2, 3, 4), (1, 2, 4), (1, 4))
    assert plan.heads_per_block == (4, 3, 2)
    assert plan.mask_heads is None


def test_masked_heads_cut_nothing() -> None:
    plan = plan_for(head_keep_rate=0.4, head_mode="mask")
    assert plan.mask_heads == (4, 3, 2)
    assert plan.heads is None
    assert plan.heads_per_block == (5, 5, 5)


def test_tokens_per_block_count_the_prefix() -> None:
    plan = prune_(tiny_vit("registers"), PruneConfig(keep_per_block=(30, 20, 9)))
    assert plan.tokens_per_block == (35, 25, 14)


@pytest.mark.parametrize(
    "dials", [{"macs": 0.6}, {"head_keep_rate": 0.4}, {"head_keep_rate": 0.4, "head_mode": "mask"}]
)
def test_a_plan_survives_being_written_down(dials: dict[str, Any], images: Tensor, tmp_path: Path) -> None:
    plan = prune_(tiny_vit(), PruneConfig(**dials), calibration=images)
    assert Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads(plan.to_json())["patches_per_block"] == list(plan.patches_per_block)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"not a plan: Expecting property name"),
        ("[1]", r"not a plan: expected an object with patches_per_block, as written by Plan.save"),
        ("{}", r"not a plan: expected an object"),
        (
            '{"patches_per_block": [1]}',
            r"missing fields in the plan: method, model, num_heads, num_patches, num_prefix",
        ),
    ],
)
def test_what_is_not_a_plan_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        Plan.from_json(text)
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=rf"cannot read the plan .*broken.json: {words}"):
        Plan.load(tmp_path / "broken.json")


def test_a_plan_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the plan .*none.json: .*No such file"):
        Plan.load(tmp_path / "none.json")


def test_a_plan_of_a_later_version_asks_for_an_upgrade() -> None:
    later = dataclasses.replace(plan_for(), version=2)
    with pytest.raises(ValueError, match=r"plan version 2 is newer than this cpvit reads \(1\); upgrade"):
        Plan.from_json(later.to_json())


def test_a_field_that_no_plan_has_is_named() -> None:
    text = json.dumps({**dataclasses.asdict(plan_for()), "zoom": 1, "angle": 2})
    with pytest.raises(ValueError, match="unknown fields in the plan: angle, zoom"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "changes", [{"patches_per_block": [20.5, 10, 5]}, {"patches_per_block": 5}, {"version": "x"}]
)
def test_fields_of_the_wrong_type_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"patches_per_block|version"):
        prune_(tiny_vit(), Plan.from_json(json.dumps({**dataclasses.asdict(plan_for()), **changes})))


def test_configurations_and_plans_are_values() -> None:
    assert PruneConfig(macs=0.5) == PruneConfig(macs=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PruneConfig().macs = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_for().method = "other"


@pytest.mark.parametrize("dials", [{"macs": 0.7}, {"keep_rate": 0.4}, {"macs": 0.7, "method": "tome"}])
def test_an_aligned_plan_holds_multiples_and_says_so(dials: dict[str, Any]) -> None:
    plan = plan_for(align=4, **dials)
    assert plan.align == 4
    assert all(tokens % 4 == 0 or tokens == 36 for tokens in plan.tokens_per_block[:-1])
    assert Plan.from_json(plan.to_json()) == plan


def test_nothing_is_aligned_unless_asked_for() -> None:
    assert plan_for(macs=0.7).align == 1
    assert plan_for(macs=0.7, align="none") == plan_for(macs=0.7) == plan_for(macs=0.7, align=1)


def test_auto_is_resolved_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cpvit.machine.align.predict_seconds",
        lambda bench, schedules: [3.0, 2.0, 1.99, 2.0][: len(schedules)],
    )
    assert plan_for(macs=0.7, align="auto") == plan_for(macs=0.7, align=4), (
        "8 is not worth it: half a percent"
    )


def test_a_multiple_too_large_to_prune_with_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"align=64 leaves nothing to prune in .*, which has 36 tokens; give a smaller"
    ):
        plan_for(keep_rate=0.5, align=64)


def test_a_plan_written_before_there_was_an_alignment_is_read() -> None:
    values = dataclasses.asdict(plan_for())
    del values["align"]
    assert Plan.from_json(json.dumps(values)) == plan_for()
