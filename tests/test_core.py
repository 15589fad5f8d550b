"""The tensor functions of the method, on numbers small enough to check by hand."""

from __future__ import annotations

import pytest
import torch

from cpvit.core import (
    CPViT,
    TokenState,
    drop_lowest_heads,
    full_grid,
    head_score,
    highest,
    initial_state,
    patch_score,
    remove,
    scatter_patches,
    take,
    token_sizes,
    zero_masked_heads,
)

EVIDENCE = torch.tensor([[[0.5, 0.1, 0.2], [0.3, 0.4, 0.6]]])
"""[1 2 3]: one image, two heads, one prefix token and two patches."""


def rows(*values: float) -> torch.Tensor:
    """Tokens of two channels, distinguished by their first: [1 N 2]."""
    return torch.tensor([[[value, -value] for value in values]])


def test_patch_score_sums_the_heads_and_leaves_the_prefix_out() -> None:
    torch.testing.assert_close(patch_score(EVIDENCE, 1), torch.tensor([[0.5, 0.8]]))


def test_head_score_sums_every_token() -> None:
    torch.testing.assert_close(head_score(EVIDENCE), torch.tensor([[0.8, 1.3]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_at_least_float32(dtype: torch.dtype) -> None:
    assert patch_score(EVIDENCE.to(dtype), 1).dtype == torch.float32
    assert head_score(EVIDENCE.double()).dtype == torch.float64


def test_scores_accumulate_over_blocks() -> None:
    state = initial_state(torch.zeros(1, 3, 2), 1, track_carrier=False, keep_departed=False)
    for _ in range(3):
        state = CPViT().observe(state, EVIDENCE, 1)
    torch.testing.assert_close(state.score, torch.tensor([[1.5, 2.4]]))


def test_the_highest_scores_come_in_original_order() -> None:
    score = torch.tensor([[3.0, 1.0, 5.0, 4.0], [1.0, 2.0, 3.0, 0.0]])
    assert highest(score, 2).tolist() == [[2, 3], [1, 2]]


@pytest.mark.parametrize("tail", [(), (2,), (2, 3)])
def test_take_gathers_whole_rows(tail: tuple[int, ...]) -> None:
    values = torch.randn(2, 5, *tail)
    index = torch.tensor([[4, 0], [1, 1]])
    got = take(values, index)
    assert all(torch.equal(got[b, k], values[b, index[b, k]]) for b in range(2) for k in range(2))


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_removal_keeps_the_prefix_and_what_is_known_of_the_kept(prefix: int) -> None:
    x = rows(*range(10, 10 + prefix), 0, 1, 2, 3)
    state = TokenState(
        positions=torch.tensor([[2, 5, 6, 9]]),
        score=torch.tensor([[0.1, 0.2, 0.3, 0.4]]),
        size=torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
    )
    left, after = remove(x, state, torch.tensor([[1, 3]]), prefix)
    assert left[0, :, 0].tolist() == [*range(10, 10 + prefix), 1, 3]
    assert after.positions.tolist() == [[5, 9]]
    torch.testing.assert_close(after.score, torch.tensor([[0.2, 0.4]]))
    torch.testing.assert_close(after.size, torch.tensor([[2.0, 4.0]]))


def test_a_state_is_a_value_that_removal_does_not_change() -> None:
    state = initial_state(rows(0, 1, 2), 0, track_carrier=False, keep_departed=True)
    remove(rows(7, 8, 9), state, torch.tensor([[1]]), 0)
    assert state.positions.tolist() == [[0, 1, 2]]
    assert state.departed[0, :, 0].tolist() == [0, 1, 2]


def test_the_grid_shows_survivors_as_they_are_and_others_as_they_left() -> None:
    state = initial_state(rows(9, 0, 1, 2, 3), 1, track_carrier=False, keep_departed=True)
    x, state = remove(rows(90, 10, 11, 12, 13), state, torch.tensor([[0, 2, 3]]), 1)
    x, state = remove(x + 100 * x.sign(), state, torch.tensor([[1]]), 1)
    assert full_grid(x, state, 1)[0, :, 0].tolist() == [190, 110, 11, 112, 113]


def test_the_grid_of_merged_patches_shows_their_carrier() -> None:
    state = TokenState(positions=torch.tensor([[0, 2]]), carrier=torch.tensor([[0, 1, 1, 0]]))
    assert full_grid(rows(9, 5, 6), state, 1)[0, :, 0].tolist() == [9, 5, 6, 6, 5]


def test_patches_are_written_at_their_positions() -> None:
    grid = scatter_patches(rows(0, 0, 0, 0), torch.tensor([[3, 1]]), rows(5, 6))
    assert grid[0, :, 0].tolist() == [0, 6, 0, 5]


def test_only_the_highest_heads_of_each_image_pass() -> None:
    out = torch.ones(2, 3, 1, 1)
    left = drop_lowest_heads(torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]]), 2)
    assert zero_masked_heads(out, left).flatten(1).tolist() == [[1, 0, 1], [0, 1, 1]]
    assert zero_masked_heads(out, left + 100).flatten(1).tolist() == [[1, 0, 1], [0, 1, 1]], "no way back"
    assert zero_masked_heads(out, None) is out


def test_prefix_tokens_have_size_one() -> None:
    state = TokenState(positions=torch.zeros(1, 2, dtype=torch.int64), size=torch.tensor([[3.0, 2.0]]))
    assert token_sizes(state, 2).tolist() == [[1, 1, 3, 2]]
    assert token_sizes(state._replace(size=None), 2) is None


def test_the_first_state_knows_every_patch_and_no_score() -> None:
    state = initial_state(torch.zeros(2, 5, 3), 1, track_carrier=True, keep_departed=True)
    assert state.positions.tolist() == state.carrier.tolist() == [[0, 1, 2, 3]] * 2
    assert state.departed.shape == (2, 4, 3)
    assert state.score is None
    assert state.head_score is None
    assert state.size is None
