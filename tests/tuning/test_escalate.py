"""From a wanted agreement to a plan and a margin, or to a plan alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_vit

from cpvit import prune_
from cpvit.plans.escalation import Escalation
from cpvit.plans.plan import Plan
from cpvit.pruning.escalation import mean_macs, prediction_margin
from cpvit.pruning.opening import open_restored
from cpvit.tuning import escalate
from cpvit.tuning.escalate import Stage, margins_for, tune_escalation


def stage(macs: float, error: float, images: int = 4000, seed: int = 0) -> Stage:
    """Errors are likelier where the margin is small, and the likelier the harder the plan."""
    generator = torch.Generator().manual_seed(seed)
    margins = torch.rand(images, generator=generator)
    risk = torch.sigmoid((error - 14) * margins.sqrt() + 1 + error / 4)
    return Stage(None, macs, torch.rand(images, generator=generator) >= risk, margins)  # type: ignore[arg-type]


STAGES = [stage(0.5, 4.0, seed=1), stage(0.6, 2.0, seed=2), stage(0.7, 0.0, seed=3)]


@pytest.mark.parametrize("wanted", [0.97, 0.99, 0.995])
def test_the_margin_holds_on_images_it_was_not_fitted_on(wanted: float) -> None:
    margins = margins_for(STAGES, slice(0, None, 2), wanted)
    assert margins == sorted(margins, reverse=True), "gentler plans need a smaller margin"
    for found, margin in zip(STAGES, margins, strict=True):
        rest = slice(1, None, 2)
        held = (found.agrees[rest] | (found.margins[rest] < margin)).float().mean()
        assert held >= wanted - 0.003
        assert 0 < margin < 1


def test_more_agreement_needs_a_larger_margin() -> None:
    loose, strict = (margins_for(STAGES, slice(None), wanted) for wanted in (0.97, 0.999))
    assert all(low < high for low, high in zip(loose, strict, strict=True))


def test_without_an_error_nothing_runs_again() -> None:
    perfect = Stage(None, 0.6, torch.ones(10, dtype=torch.bool), torch.rand(10))  # type: ignore[arg-type]
    assert margins_for([perfect], slice(None), 0.9) == [0.0]
    assert margins_for([Stage(None, 0.6, ~perfect.agrees, perfect.margins)], slice(None), 0.9) == [1.0]  # type: ignore[arg-type]


def images(count: int = 24) -> torch.Tensor:
    return torch.randn(count, 3, 112, 112, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def model() -> Any:
    return tiny_vit(depth=4, img_size=(112, 112))


def test_two_stages_are_found_and_say_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a margin of 0.2 for every plan the hardest of those that leave few images unsure is cheapest."""
    monkeypatch.setattr(escalate, "margins_for", lambda stages, images, wanted: [0.2 for _ in stages])
    monkeypatch.setattr(escalate.Stage, "agreement", property(lambda self: 0.0))
    network, pictures = model(), images()
    found = tune_escalation(network, pictures, 0.9)
    assert isinstance(found.found, Escalation)
    assert found.static_macs_ratio is None
    assert found.calibration_images == 24
    host = open_restored(network)
    assert found.macs_ratio == pytest.approx(mean_macs(host, found.found, found.share), abs=1e-6)
    prune_(network, found.found.light, verify=False)
    with torch.no_grad():
        unsure = prediction_margin(network(pictures)) < 0.2
    assert found.share == pytest.approx(unsure.float().mean().item())


def test_a_plan_alone_is_chosen_where_it_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(escalate, "margins_for", lambda stages, images, wanted: [1.0 for _ in stages])
    monkeypatch.setattr(escalate.Stage, "agreement", property(lambda self: self.macs))
    found = tune_escalation(model(), images(), 0.78)
    assert isinstance(found.found, Plan)
    assert found.macs_ratio == pytest.approx(0.8, abs=0.005)
    assert found.share == 0


@pytest.mark.parametrize("wanted", [0.0, 1.0, -1.0])
def test_an_agreement_that_cannot_be_promised_is_refused(wanted: float) -> None:
    with pytest.raises(
        ValueError, match=f"min_agreement must be between 0 and 1 to escalate for it, got {wanted}"
    ):
        tune_escalation(model(), images(2), wanted)
