"""The pictures: which blocks become columns, what a removed or merged patch looks like, and every refusal."""

import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch import Tensor

from cpvit.pictures.survivors import draw_survivors, stages

GRID = (3, 5)
B, N = 2, 15


@pytest.fixture
def images() -> Tensor:
    return torch.rand(B, 3, 12, 20, generator=torch.Generator().manual_seed(0))


def survivors(*counts: int) -> list[Tensor]:
    return [torch.arange(count).expand(B, -1) for count in counts]


def flat(path: Path) -> Tensor:
    """The pixels [M 3] of a PNG."""
    return torch.as_tensor(matplotlib.image.imread(path)[..., :3]).flatten(0, 1)


def test_stages_are_the_blocks_where_patches_leave() -> None:
    assert stages([16, 12, 12, 8], 16) == (1, 3)


def test_stages_of_a_long_schedule_are_spread_from_first_to_last() -> None:
    chosen = stages(range(99, 87, -1), 100, limit=4)
    assert chosen == (0, 4, 7, 11)


def test_stages_of_a_model_that_removes_nothing_are_its_last_block() -> None:
    assert stages([7, 7, 7], 7) == (2,)


def test_stages_refuse_no_blocks() -> None:
    with pytest.raises(ValueError, match="counts is empty"):
        stages([], 5)


def test_picture_has_a_row_per_image_and_a_column_per_stage(images: Tensor, tmp_path: Path) -> None:
    one = draw_survivors(images, survivors(15, 11, 11), GRID, path=tmp_path / "one.png")
    three = draw_survivors(images, survivors(13, 11, 7), GRID, path=tmp_path / "new" / "three.png")
    (height, width), (same_height, wider) = (matplotlib.image.imread(p).shape[:2] for p in (one, three))
    assert abs(height - same_height) < 8
    assert 1.7 * width < wider < 2.3 * width  # 4 columns against 2
    assert one.stat().st_size > 4_000


def test_removed_patches_fade_and_survivors_keep_their_colour(tmp_path: Path) -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(B, 3, 12, 20)
    kept = draw_survivors(red, survivors(N), GRID, blocks=[0], path=tmp_path / "kept.png")
    gone = draw_survivors(red, survivors(1), GRID, blocks=[0], path=tmp_path / "gone.png")
    share = [
        (flat(path) == torch.tensor([1.0, 0.0, 0.0])).all(1).double().mean().item() for path in (kept, gone)
    ]
    assert share[0] > 1.4 * share[1]
    assert share[1] > 0.1  # the first column still shows the whole image


def test_merged_patches_take_the_mean_colour_of_their_group(tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 12, 20)
    image[:, 2, :, 10:] = 1.0  # half black, half blue
    carrier = [torch.zeros(1, 10, dtype=torch.long)]
    path = draw_survivors(
        image, [torch.zeros(1, 1, dtype=torch.long)], (2, 5), carriers=carrier, path=tmp_path / "merged.png"
    )
    blue = flat(path)
    half = (blue - torch.tensor([0.0, 0.0, 0.5])).abs().amax(1) < 0.01
    assert half.double().mean() > 0.1


def test_titles_stand_beside_the_rows(images: Tensor, tmp_path: Path) -> None:
    bare = draw_survivors(images, survivors(7), GRID, path=tmp_path / "bare.png")
    titled = draw_survivors(images, survivors(7), GRID, titles=["two", "words"], path=tmp_path / "titled.png")
    assert matplotlib.image.imread(titled).shape[1] > matplotlib.image.imread(bare).shape[1]


def test_drawing_leaves_the_callers_plots_alone(images: Tensor, tmp_path: Path) -> None:
    had_pyplot = "matplotlib.pyplot" in sys.modules
    draw_survivors(images[:, :1], survivors(7), GRID, path=tmp_path / "grey.png")
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.rand(3, 12, 20)}, ValueError, r"images must be \[B 3 H W\].*\[3, 12, 20\]"),
        ({"images": torch.rand(0, 3, 12, 20)}, ValueError, "images is empty"),
        ({"images": torch.rand(B, 3, 12, 20) - 2}, ValueError, "between 0 and 1.*undo the normalisation"),
        ({"grid": (5, 5)}, ValueError, "12x20 pixels do not divide into a grid of 5x5"),
        ({"survivors": []}, ValueError, "survivors is empty"),
        (
            {"survivors": [torch.zeros(3, 7).long()]},
            ValueError,
            r"block 0 have shape \[3, 7\], expected \[2, K\]",
        ),
        ({"survivors": [torch.zeros(B, 7)]}, TypeError, "block 0 must be whole numbers.*torch.float32"),
        ({"survivors": [torch.full((B, 7), N)]}, ValueError, "run from 15 to 15.*positions 0 to 14.*prefix"),
        ({"titles": ["only one"]}, ValueError, "titles has 1 entries but there are 2 images"),
        ({"carriers": []}, ValueError, "carriers has 0 blocks but survivors has 1"),
        (
            {"carriers": [torch.zeros(B, 4).long()]},
            ValueError,
            r"carriers of block 0 .*\[2, 4\], expected \[2, 15\]",
        ),
        ({"blocks": [0, 1]}, ValueError, r"from 0 to 0, got \[0, 1\]"),
        ({"blocks": []}, ValueError, "at least one block"),
    ],
)
def test_mismatches_are_refused(
    images: Tensor, tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    given: dict[str, object] = {"images": images, "survivors": survivors(7), "grid": GRID} | change
    with pytest.raises(error, match=message):
        draw_survivors(**given, path=tmp_path / "never.png")  # type: ignore[arg-type]
    assert not (tmp_path / "never.png").exists()
