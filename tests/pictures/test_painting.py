"""What a painted block shows: dimmed, merged and untouched patches, borders between tokens, and every refusal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL.Image import Image
from torch import Tensor

from cpvit.pictures.attention import paint_attention
from cpvit.pictures.patches import MODES, Mode, paint_block

GRID = (2, 3)
SIDE = 120
"""Pixels of a patch; the picture is not enlarged."""
COLOURS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]).float()


@pytest.fixture
def image() -> Tensor:
    """[3 240 360], each of the six patches of its own colour."""
    cells = COLOURS.view(2, 3, 3).permute(2, 0, 1)
    return cells.repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2)


def centre(picture: Image, patch: int) -> list[int]:
    row, column = divmod(patch, GRID[1])
    pixel = picture.getpixel((column * SIDE + SIDE // 2, row * SIDE + SIDE // 2))
    assert isinstance(pixel, tuple)
    return list(pixel)


def between(picture: Image, patch: int, axis: str) -> list[int]:
    """The pixel on the border of a patch and its right or lower neighbour."""
    row, column = divmod(patch, GRID[1])
    at = {
        "right": ((column + 1) * SIDE, row * SIDE + SIDE // 2),
        "below": (column * SIDE + SIDE // 2, (row + 1) * SIDE),
    }
    pixel = picture.getpixel(at[axis])
    assert isinstance(pixel, tuple)
    return list(pixel)


def of(patch: int) -> list[int]:
    return [int(255 * value) for value in COLOURS[patch]]


WHITE = [255, 255, 255]


def test_removed_patches_are_dimmed_and_a_line_runs_around_what_is_left(image: Tensor) -> None:
    picture = paint_block(image, torch.tensor([0, 1]), None, GRID)
    assert picture.size == (360, 240)
    assert [centre(picture, patch) for patch in (0, 1)] == [of(0), of(1)]
    for patch in (2, 3, 4, 5):
        red, green, blue = centre(picture, patch)
        assert red == green == blue > 200
    assert between(picture, 0, "right") == of(1)  # both are tokens of their own
    assert between(picture, 1, "right") == WHITE
    assert between(picture, 0, "below") == WHITE


@pytest.mark.parametrize("mode", MODES)
def test_merged_patches_take_their_mean_colour_or_an_outline(image: Tensor, mode: Mode) -> None:
    carrier = torch.tensor([0, 0, 1, 0, 2, 3])  # patches 0, 1 and 3 became one token
    picture = paint_block(image, torch.tensor([0, 2, 4, 5]), carrier, GRID, mode=mode)
    mean = [round(255 * 2 / 3), round(255 * 2 / 3), 0]
    for patch in (0, 1, 3):
        assert centre(picture, patch) == (of(patch) if mode == "outline" else mean)
    for patch in (2, 4, 5):
        assert centre(picture, patch) == of(patch)
    lined = mode != "mean"
    assert (between(picture, 1, "right") == WHITE) == lined
    assert (between(picture, 1, "below") == WHITE) == lined
    assert between(picture, 0, "right") != WHITE  # inside the token
    assert between(picture, 4, "right") == of(5)  # between two tokens that nothing was merged into


def test_a_token_in_two_places_has_one_colour(image: Tensor) -> None:
    picture = paint_block(image, torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 3, 4, 0]), GRID)
    assert centre(picture, 0) == centre(picture, 5) == [255, 0, 128]


def test_small_images_are_enlarged_by_whole_numbers() -> None:
    grey = torch.full((1, 32, 48), 0.5)
    assert paint_block(grey, torch.arange(6), None, GRID).size == (7 * 48, 7 * 32)
    assert paint_block(grey, torch.arange(6), None, GRID, min_side=1).size == (48, 32)


def test_nothing_removed_is_the_image(image: Tensor) -> None:
    picture = paint_block(image, torch.arange(6), None, GRID)
    assert np.array_equal(np.asarray(picture), (255 * image).byte().permute(1, 2, 0).numpy())


def test_attention_is_brighter_where_the_score_is_higher(image: Tensor) -> None:
    picture = paint_attention(torch.full_like(image, 0.5), torch.tensor([0.0, 1, 2, 3, 4, 5]), GRID)
    brightness = [sum(centre(picture, patch)) for patch in range(6)]
    assert brightness == sorted(brightness)
    blue, yellow = centre(picture, 0), centre(picture, 5)
    assert blue[2] > blue[0]
    assert yellow[0] > yellow[2]


def test_patches_without_a_score_stay_grey(image: Tensor) -> None:
    scores = torch.tensor([0.0, 1, 2, 3, 4, float("nan")])
    red, green, blue = centre(paint_attention(image, scores, GRID), 5)
    assert red == green == blue


def test_equal_scores_are_no_error(image: Tensor) -> None:
    picture = paint_attention(image, torch.ones(6), GRID)
    assert picture.size == (360, 240)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.rand(1, 3, 240, 360)}, ValueError, r"image must be \[3 H W\].*\[1, 3, 240, 360\]"),
        ({"image": torch.rand(3, 240, 360) - 2}, ValueError, "between 0 and 1.*undo the normalisation"),
        ({"image": torch.full((3, 240, 360), float("nan"))}, ValueError, "between 0 and 1, got nan"),
        ({"image": torch.rand(3, 240, 361)}, ValueError, "240x361 pixels does not divide into a grid of 2x3"),
        ({"positions": torch.zeros(1, 2).long()}, ValueError, r"positions must have one dimension.*\[1, 2\]"),
        ({"positions": torch.zeros(2)}, TypeError, "positions must be whole numbers, got torch.float32"),
        (
            {"positions": torch.tensor([6])},
            ValueError,
            "run from 6 to 6, expected 0 to 5; leave prefix tokens",
        ),
        ({"carrier": torch.zeros(5).long()}, ValueError, r"carrier has shape \[5\], expected \[6\]"),
        ({"carrier": torch.full((6,), 2)}, ValueError, "carrier run from 2 to 2, expected 0 to 1"),
        ({"mode": "pretty"}, ValueError, "mode must be one of mean, outline, both, got 'pretty'"),
    ],
)
def test_mismatches_are_refused(
    image: Tensor, change: dict[str, object], error: type[Exception], message: str
) -> None:
    given = {"image": image, "positions": torch.tensor([0, 1]), "carrier": None, "grid": GRID} | change
    with pytest.raises(error, match=message):
        paint_block(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.rand(5), r"scores have shape \[5\], expected \[6\]"),
        (torch.full((6,), float("nan")), "scores are all NaN"),
    ],
)
def test_scores_that_do_not_fit_are_refused(image: Tensor, scores: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paint_attention(image, scores, GRID)
