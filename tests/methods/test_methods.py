"""Every method: what holds for all of them, and each against a slow implementation of its publication."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import PATCHES, random_images, tiny_vit
from torch import Tensor
from torch.nn import functional as F

from cpvit import PruneConfig, prune_, record, unprune_
from cpvit.attention import AttentionInputs
from cpvit.core import BlockStep, TokenState
from cpvit.methods import METHODS, method_named
from cpvit.methods.cpvit_merge import FLOOR
from cpvit.methods.merging import merge
from cpvit.methods.removal import scramble
from cpvit.methods.tome import bipartite
from cpvit.plans.macs import count_macs

MERGING = [name for name, method in METHODS.items() if method.merges]


@pytest.fixture(params=sorted(METHODS))
def method(request: pytest.FixtureRequest) -> Any:
    return METHODS[request.param]


def test_an_unknown_method_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"method must be one of cpvit, cpvit-merge, tome, .*, got 'tom'"):
        method_named("tom")


def test_planned_macs_are_counted_macs(method: Any, any_model: Any) -> None:
    dense = count_macs(any_model)
    plan = prune_(any_model, PruneConfig(method=method.name, macs=0.7))
    assert count_macs(any_model) / dense == pytest.approx(plan.macs_ratio, abs=1e-6)
    assert plan.macs_ratio == pytest.approx(0.7, abs=0.0035)


def test_the_planned_number_of_tokens_leaves_each_block(method: Any, any_model: Any) -> None:
    plan = prune_(any_model, PruneConfig(method=method.name, keep_rate=0.4), verify=False)
    with record(any_model) as trace:
        assert torch.isfinite(any_model(random_images())).all()
    assert tuple(kept.shape[1] for kept in trace.survivors) == plan.patches_per_block


def test_an_image_alone_equals_the_same_image_in_a_batch(method: Any) -> None:
    model, images = tiny_vit(), random_images(4)
    prune_(model, PruneConfig(method=method.name, keep_rate=0.4))
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MERGING)
def test_every_patch_is_merged_into_exactly_one_token(name: str, any_model: Any) -> None:
    prune_(any_model, PruneConfig(method=name, keep_rate=0.4), verify=False)
    with record(any_model) as trace:
        any_model(random_images())
    for carrier, kept in zip(trace.carriers, trace.survivors, strict=True):
        assert carrier is not None
        assert carrier.shape == (3, PATCHES)
        for image in carrier:
            assert set(image.tolist()) == set(range(kept.shape[1]))


def test_it_compiles_in_one_graph_and_exports_with_any_batch(method: Any) -> None:
    model, images = tiny_vit(), random_images(3)
    prune_(model, PruneConfig(method=method.name, keep_rate=0.4))
    expected = model(images)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), expected)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=False)
    torch.testing.assert_close(program.module()(random_images(5)), model(random_images(5)))


def test_it_runs_in_bfloat16(method: Any) -> None:
    model = tiny_vit().bfloat16()
    prune_(model, PruneConfig(method=method.name, keep_rate=0.4))
    assert torch.isfinite(model(random_images(dtype=torch.bfloat16))).all()


def test_undoing_restores_the_model_bit_for_bit(method: Any) -> None:
    model, images = tiny_vit(), random_images()
    expected = model(images)
    prune_(model, PruneConfig(method=method.name, keep_rate=0.4))
    assert not torch.equal(model(images), expected)
    unprune_(model)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("tome", "constant"), ("pitome", "constant-fraction"), ("evit", "stages"), ("topk", "stages")],
)
def test_every_other_method_has_the_schedule_of_its_publication(name: str, schedule: str) -> None:
    model = tiny_vit(depth=12, img_size=(112, 112))
    plan = prune_(model, PruneConfig(method=name, keep_rate=0.3), verify=False)
    assert plan.schedule == schedule
    counts = (196, *plan.patches_per_block)
    removed = [before - after for before, after in itertools.pairwise(counts)]
    if schedule == "constant":
        assert max(removed) - min(removed) <= 1
    if schedule == "stages":
        assert [block for block, gone in enumerate(removed) if gone] == [3, 6, 9]
    if schedule == "constant-fraction":
        fractions = [after / before for before, after in itertools.pairwise(counts)]
        assert max(fractions) - min(fractions) < 0.02


# --- against slow implementations of the publications ------------------------------------------------------


def random_block(patches: int = 17, *, seed: int = 0) -> tuple[Tensor, AttentionInputs, TokenState]:
    """One image: tokens [1 1+n 10], keys of 3 heads, and the state of tokens of 1 to 3 patches each."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, key = noise(1, 1 + patches, 10), noise(1, 3, 1 + patches, 5)
    size = torch.randint(1, 4, (1, patches), generator=generator).double()
    positions = torch.arange(patches)[None]
    score = noise(1, patches).exp()
    return (
        x,
        AttentionInputs(key, key, key, 1.0),
        TokenState(positions, score=score, size=size, carrier=positions),
    )


def averaged(x: Tensor, size: Tensor, groups: list[list[int]]) -> Tensor:
    """The class token, then one size-weighted mean for each group of patches."""
    patches = x[0, 1:]
    means = [(patches[g] * size[0, g, None]).sum(0) / size[0, g].sum() for g in groups]
    return torch.stack([x[0, 0], *means])


def stretched(x: Tensor, size: Tensor, groups: list[list[int]]) -> Tensor:
    """The same, every mean as long as the longest patch of its group."""
    means = averaged(x, size, groups)
    for place, group in enumerate(groups, start=1):
        means[place] *= x[0, 1:][group].norm(dim=1).max() / means[place].norm()
    return means


def grouped(order: list[int], target: dict[int, int]) -> list[list[int]]:
    return [[kept, *(source for source, into in target.items() if into == kept)] for kept in order]


@pytest.mark.parametrize("removed", [1, 3, 8])
def test_tome_merges_the_most_similar_pairs_of_sources_and_destinations(removed: int) -> None:
    x, inputs, state = random_block()
    keys = F.normalize(inputs.key[0, :, 1:].mean(0), dim=-1)
    first, second = list(range(1, 17, 2)), list(range(0, 17, 2))  # the class token holds place 0
    edges = sorted(((float(keys[i] @ keys[j]), i, j) for i in first for j in second), reverse=True)
    best: dict[int, tuple[float, int]] = {}
    for similarity, i, j in edges:
        best.setdefault(i, (similarity, j))
    chosen = sorted(best, key=lambda i: -best[i][0])[:removed]
    order = [i for i in first if i not in chosen] + second
    expected = averaged(x, state.size, grouped(order, {i: best[i][1] for i in chosen}))
    got, _ = METHODS["tome"].reduce(x, state, inputs, BlockStep(17 - removed, False), 1)
    torch.testing.assert_close(got[0], expected)


@pytest.mark.parametrize(("depth", "removed"), [(0.0, 4), (0.25, 8), (0.5, 3), (0.5, 8), (0.75, 8)])
def test_pitome_merges_tokens_of_high_energy(depth: float, removed: int) -> None:
    x, inputs, state = random_block()
    keys = F.normalize(inputs.key[0, :, 1:].mean(0), dim=-1)
    similarity, margin = keys @ keys.T, 0.75 * (1 - depth)
    energy = [sum(float(F.elu(value - margin)) for value in row) for row in similarity]
    rank = sorted(range(17), key=lambda i: -energy[i])
    split = rank if depth < 0.5 else rank[: 2 * removed]
    first, second = split[::2], split[1::2]
    partner = {i: max(second, key=lambda j, i=i: float(similarity[i, j])) for i in first}
    chosen = sorted(first, key=lambda i: -float(similarity[i, partner[i]]))[:removed]
    target = {i: partner[i] for i in chosen}
    got, left = METHODS["pitome"].reduce(x, state, inputs, BlockStep(17 - removed, False, depth=depth), 1)
    expected = averaged(x, state.size, grouped(left.positions[0].tolist(), target))
    assert set(left.positions[0].tolist()) == set(range(17)) - set(chosen)
    torch.testing.assert_close(got[0], expected)


def test_evit_fuses_what_leaves_weighted_by_attention() -> None:
    x, inputs, state = random_block()
    order = state.score[0].argsort(descending=True)
    kept, left = order[:5].sort().values, order[5:]
    weight = state.score[0, left] / state.score[0, left].sum()
    got, after = METHODS["evit"].reduce(x, state, inputs, BlockStep(6, True), 1)
    torch.testing.assert_close(got[0, 1:6], x[0, 1:][kept])
    torch.testing.assert_close(got[0, 6], (x[0, 1:][left] * weight[:, None]).sum(0))
    assert after.carrier is not None
    assert set(after.carrier[0, left].tolist()) == {5}


def test_topk_keeps_what_the_class_token_attends_to() -> None:
    x, inputs, state = random_block()
    _, after = METHODS["topk"].reduce(x, state, inputs, BlockStep(6, True), 1)
    assert set(after.positions[0].tolist()) == set(state.score[0].topk(6).indices.tolist())


@pytest.mark.parametrize("removed", [1, 5, 8])
def test_cpvit_merge_takes_the_cheapest_merges(removed: int) -> None:
    x, inputs, state = random_block()
    patches, size, score = x[0, 1:], state.size[0], state.score[0]

    def similarity(i: int, j: int) -> float:
        return float(F.cosine_similarity(patches[i], patches[j], dim=0))

    def cost(i: int, group: list[int]) -> float:
        size_j, score_j = size[group].sum(), score[group].sum()
        ward = size[i] * size_j / (size[i] + size_j)
        importance = score[i] / size[i] + score_j / size_j + FLOOR
        return float(ward * (1 - similarity(i, group[0])) * importance)

    first, second = range(1, 17, 2), range(0, 17, 2)
    partner = {i: max(second, key=lambda j, i=i: similarity(i, j)) for i in first}
    alone = {i: cost(i, [partner[i]]) for i in first}
    cheaper = {i: [k for k in first if partner[k] == partner[i] and alone[k] < alone[i]] for i in first}
    assert any(cheaper.values())
    chosen = sorted(first, key=lambda i: cost(i, [partner[i], *cheaper[i]]))[:removed]
    order = [i for i in first if i not in chosen] + list(second)
    expected = stretched(x, state.size, grouped(order, {i: partner[i] for i in chosen}))
    got, _ = METHODS["cpvit-merge"].reduce(x, state, inputs, BlockStep(17 - removed, True), 1)
    torch.testing.assert_close(got[0], expected)


def test_cpvit_merge_of_more_than_the_sources_merges_the_least_important() -> None:
    x, inputs, state = random_block()
    _, after = METHODS["cpvit-merge"].reduce(x, state, inputs, BlockStep(3, True), 1)
    assert set(after.positions[0].tolist()) == set(state.score[0].topk(3).indices.tolist())


def test_merging_keeps_the_sum_over_all_patches() -> None:
    x, _, state = random_block()
    sources, destinations, kept = torch.tensor([[3, 0]]), torch.tensor([[1, 1]]), torch.tensor([[2, 5, 4]])
    covered = [0, 2, 3, 4, 5]
    got, after = merge(x, state, sources, destinations, kept, 1)
    before = (x[0, 1:] * state.size[0, :, None])[covered].sum(0)
    torch.testing.assert_close((got[0, 1:] * after.size[0, :, None]).sum(0), before)
    assert after.size.sum() == state.size[0, covered].sum()


def test_merged_tokens_are_as_long_as_the_longest_in_them_also_for_autograd() -> None:
    x, _, state = random_block(6)
    sources, destinations, kept = (
        torch.tensor([[3, 0, 1]]),
        torch.tensor([[1, 1, 2]]),
        torch.tensor([[2, 5, 4]]),
    )

    def merged(x: Tensor) -> Tensor:
        return merge(x, state, sources, destinations, kept, 1, keep_length=True)[0]

    torch.testing.assert_close(merged(x), stretched(x, state.size, [[2], [5, 3, 0], [4, 1]])[None])
    assert torch.autograd.gradcheck(merged, x.clone().requires_grad_())


def test_a_merged_token_counts_for_less_the_less_its_tokens_agree() -> None:
    state = TokenState(
        torch.arange(4)[None], size=torch.tensor([[1.0, 1.0, 1.0, 3.0]]), score=torch.ones(1, 4)
    )
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    sources, destinations, kept = torch.tensor([[0, 2]]), torch.tensor([[0, 1]]), torch.tensor([[1, 3]])
    x = torch.stack([east, north, 5 * east, 2 * east])[None]
    _, after = merge(x, state, sources, destinations, kept, 0, keep_length=True)
    right_angle, same_direction = 2 * 0.5**0.25, 4 * (2.75 / 5) ** 0.5
    torch.testing.assert_close(after.size, torch.tensor([[right_angle, same_direction]]))


@pytest.mark.parametrize(("prefix", "first"), [(0, 0), (1, 1), (2, 0), (5, 1)])
def test_sources_and_destinations_alternate_with_the_prefix_counted(prefix: int, first: int) -> None:
    one, other = bipartite(torch.arange(7)[None], prefix)
    assert one[0].tolist() == list(range(first, 7, 2))
    assert sorted([*one[0].tolist(), *other[0].tolist()]) == list(range(7))


@pytest.mark.parametrize("name", ["topk", "evit-no-fuse", "evit"])
def test_a_baseline_scores_by_the_attention_of_the_current_block_alone(name: str) -> None:
    _, _, state = random_block(2)
    evidence = torch.tensor([[[9.0, 0.1, 0.2], [9.0, 0.3, 0.6]]], dtype=torch.float64)
    score = METHODS[name].observe(state, evidence, 1).score
    torch.testing.assert_close(score, torch.tensor([[0.4, 0.8]], dtype=torch.float64))


def test_importance_of_cpvit_merge_has_mean_one_in_every_block() -> None:
    _, _, state = random_block(2)
    evidence = torch.tensor([[[9.0, 0.1, 0.2], [9.0, 0.3, 0.6]]], dtype=torch.float64)
    score = METHODS["cpvit-merge"].observe(state, evidence, 1).score
    torch.testing.assert_close(score, torch.tensor([[2 / 3, 4 / 3]], dtype=torch.float64))


def test_a_random_order_differs_by_its_seed_and_not_by_the_image() -> None:
    positions = torch.arange(50).expand(2, 50)
    first, second = scramble(positions, 0), scramble(positions, 1)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first.argsort(dim=1), second.argsort(dim=1))
    assert ((first >= 0) & (first < 1)).all()
