"""Paint what leaves one block over its image: removed patches dimmed, merged patches as the token they became.

Legend: H, W height and width in pixels, N patches of the whole grid, K tokens that leave the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Mode: TypeAlias = Literal["mean", "outline", "both"]
"""How merged patches are shown: in the mean colour of their token, by a line around each token, or by both."""
MODES: tuple[Mode, ...] = ("mean", "outline", "both")

MIN_SIDE = 224
"""Pixels of the shorter side of a picture, at least: lines need room on the small images of small models."""

_REMOVED_TONE = 0.80  # removed patches are drawn in light grey ...
_REMOVED_CONTRAST = (
    0.16  # ... plus this fraction of their own brightness, so that they can still be recognised
)
_LINE, _HALO = (255, 255, 255), (0, 0, 0)  # white on black is seen on every colour, and by everybody
_REMOVED = -1
_CELLS_PER_LINE = 11  # a line is this part of a patch wide


def paint_block(
    image: Tensor,
    positions: Tensor,
    carrier: Tensor | None,
    grid: tuple[int, int],
    *,
    mode: Mode = "both",
    min_side: int = MIN_SIDE,
) -> Image:
    """The image as the tokens that leave one block see it.

    A patch that was removed is dimmed, and a line runs between what is left and what is not. Patches that were merged
    into one token have its mean colour, a line around them, or both; a patch that is a token of its own stays as it is.

    Args:
        image: [3 H W] or [1 H W], from 0 to 1.
        positions: [K] original positions of the tokens that leave the block, counted row by row over the grid.
        carrier: [N] for methods that merge: the index, from 0 to K-1, of the token that each patch was merged into.
            None for methods that remove.
        grid: Rows and columns of patches; rows * columns = N, and they divide H and W.
        mode: ``"mean"``, ``"outline"`` or ``"both"``.
        min_side: The picture is enlarged by a whole number until its shorter side has that many pixels.

    Returns:
        An RGB picture of a multiple of H x W pixels.

    Raises:
        ValueError: Shapes or values do not fit.
        TypeError: Positions or carriers are not whole numbers.

    Example:
        >>> with record(model) as trace:
        ...     model(images)
        >>> paint_block(pixels[0], trace.survivors[5][0], None, (14, 14)).save("after_block_6.png")
    """
    from PIL.ImageDraw import Draw

    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    pixels = checked_image(image, grid)
    tokens = token_of_patch(positions, carrier, grid)
    if mode != "outline":
        pixels = _mean_colours(pixels, tokens, grid)
    picture = to_picture(_dimmed(pixels, tokens, grid), min_side)
    if mode != "mean" or carrier is None:
        draw_borders(Draw(picture), picture.size, tokens.view(grid).tolist())
    return picture


def checked_image(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """The image as [3 H W] float32 on the CPU.

    Raises:
        ValueError: It is no image from 0 to 1 that divides into the grid.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must be [3 H W] or [1 H W], got shape {list(image.shape)}")
    pixels = image.detach().float().cpu().expand(3, -1, -1)
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # as well for NaN
        raise ValueError(
            f"image must lie between 0 and 1, got {pixels.min():.3g} to {pixels.max():.3g}; "
            "undo the normalisation first"
        )
    if pixels.shape[1] % grid[0] or pixels.shape[2] % grid[1]:
        raise ValueError(
            f"an image of {pixels.shape[1]}x{pixels.shape[2]} pixels does not divide into a grid of "
            f"{grid[0]}x{grid[1]} patches"
        )
    return pixels


def token_of_patch(positions: Tensor, carrier: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """For each patch [N] the index of its token, -1 if it was removed.

    Raises:
        ValueError: Shapes or values do not fit the grid.
        TypeError: They are not whole numbers.
    """
    patches = grid[0] * grid[1]
    _check_indices("positions", positions, patches)
    kept = positions.detach().cpu().long()
    if carrier is None:
        alone = torch.full((patches,), _REMOVED, dtype=torch.long)
        return alone.scatter(0, kept, torch.arange(len(kept)))
    if carrier.shape != (patches,):
        raise ValueError(
            f"carrier has shape {list(carrier.shape)}, expected [{patches}]: patches of the grid"
        )
    _check_indices("carrier", carrier, len(kept))
    return carrier.detach().cpu().long()


def _check_indices(name: str, values: Tensor, count: int) -> None:
    if values.ndim != 1:
        raise ValueError(f"{name} must have one dimension, that of one image; got shape {list(values.shape)}")
    if values.is_floating_point() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be whole numbers, got {values.dtype}")
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < count:
        hint = "; leave prefix tokens out" if name == "positions" else ""
        raise ValueError(
            f"{name} run from {int(values.min())} to {int(values.max())}, expected 0 to {count - 1}{hint}"
        )


def patch_pixels(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A value of each patch [N] on each of its pixels [H W]."""
    rows, columns = size[0] // grid[0], size[1] // grid[1]
    return values.view(grid).repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def to_picture(pixels: Tensor, min_side: int) -> Image:
    """[3 H W] from 0 to 1 as a picture, enlarged by a whole number."""
    from PIL import Image

    picture = Image.fromarray((255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy())
    factor = -(-min_side // min(picture.size))
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)


def _dimmed(pixels: Tensor, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    left = patch_pixels(tokens != _REMOVED, grid, (pixels.shape[1], pixels.shape[2]))
    return torch.where(left, pixels, _REMOVED_TONE + _REMOVED_CONTRAST * pixels.mean(0, keepdim=True))


def _mean_colours(pixels: Tensor, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every token of several patches in their mean colour; a patch that is its own token stays as it is."""
    left = tokens != _REMOVED
    token = tokens.clamp_min(0)
    patch_means = torch.nn.functional.adaptive_avg_pool2d(pixels, grid).flatten(1)  # [3 N]
    count = torch.zeros(len(tokens)).index_add_(0, token, left.float())
    total = torch.zeros(3, len(tokens)).index_add_(1, token, patch_means * left)
    means = (total / count.clamp_min(1))[:, token]  # [3 N]
    size = (pixels.shape[1], pixels.shape[2])
    merged = patch_pixels(left & (count[token] > 1), grid, size)
    return torch.where(merged, torch.stack([patch_pixels(channel, grid, size) for channel in means]), pixels)


def draw_borders(draw: ImageDraw, size: tuple[int, int], tokens: list[list[int]]) -> None:
    """A line wherever two neighbouring patches belong to different tokens, unless both are tokens of their own."""
    width, height = size[0] / len(tokens[0]), size[1] / len(tokens)
    thin = max(1, round(min(width, height) / _CELLS_PER_LINE))
    lines = list(_borders(tokens, width, height))
    for colour, thickness in ((_HALO, thin + 2), (_LINE, thin)):
        before, after = (thickness + 1) // 2, thickness - (thickness + 1) // 2
        for left, top, right, bottom in lines:
            box = (
                round(left) - before,
                round(top) - before,
                round(right) + after - 1,
                round(bottom) + after - 1,
            )
            draw.rectangle(box, fill=colour)


def _borders(
    tokens: list[list[int]], width: float, height: float
) -> Iterator[tuple[float, float, float, float]]:
    """Left, top, right and bottom of each line, in pixels."""
    flat = [token for row in tokens for token in row]
    several = {token for token in set(flat) if token == _REMOVED or flat.count(token) > 1}

    def parted(one: int, other: int) -> bool:
        return one != other and (one in several or other in several)

    for row, line in enumerate(tokens):
        for column, token in enumerate(line):
            x, y = column * width, row * height
            if column and parted(token, line[column - 1]):
                yield x, y, x, y + height
            if row and parted(token, tokens[row - 1][column]):
                yield x, y, x + width, y
