"""The most memory a forward holds at once: never more than the dense model's."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from cpvit import PruneConfig, prune_, unprune_
from cpvit.attention import AttentionInputs, attend
from cpvit.measure.memory import MIB, peak_memory_mib
from cpvit.methods import METHODS

PATCHES = 196


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def network(request: pytest.FixtureRequest) -> Any:
    model = timm.create_model("deit_small_patch16_224", depth=3, embed_dim=192, num_heads=3)
    return model.to(request.param).eval()


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_no_method_needs_more_than_the_dense_model(network: Any, batch: int) -> None:
    images = torch.zeros(batch, 3, 224, 224, dtype=next(network.parameters()).dtype)
    dense = peak_memory_mib(network, images)
    places = 8 * PATCHES / MIB  # where each patch is, one number for all images
    for name in METHODS:
        prune_(network, PruneConfig(method=name, macs=0.7), verify=False)
        pruned = peak_memory_mib(network, images)
        unprune_(network)
        assert pruned <= dense + places, name


def test_a_method_that_prunes_from_the_first_block_needs_less(network: Any) -> None:
    images = torch.zeros(16, 3, 224, 224, dtype=next(network.parameters()).dtype)
    dense = peak_memory_mib(network, images)
    for name in ("cpvit", "cpvit-merge", "tome", "random"):
        prune_(network, PruneConfig(method=name, macs=0.7), verify=False)
        pruned = peak_memory_mib(network, images)
        unprune_(network)
        assert pruned < dense, name


@pytest.mark.parametrize("kind", ["max", "class"])
def test_the_whole_attention_matrix_is_never_held(kind: Any) -> None:
    query = torch.zeros(64, 4, 128, 16)
    inputs = AttentionInputs(query, query, query, 0.25)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        attend(inputs, evidence=kind)
    allocations = [event.self_cpu_memory_usage for event in profile.events()]
    matrix = 64 * 4 * 128 * 128 * 4
    assert 0 < max(allocations) < matrix / 3
