"""Paint a score of every patch, such as the attention it gets, over its image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpvit.pictures.patches import MIN_SIDE, checked_image, patch_pixels, to_picture

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = "cividis"
"""From dark blue to yellow: even steps of brightness, and the same to people who do not see red or green."""
_OPACITY = 0.7


def paint_attention(
    image: Tensor, scores: Tensor, grid: tuple[int, int], *, min_side: int = MIN_SIDE
) -> Image:
    """A heat map of the patches over the image in grey, from the lowest score (dark blue) to the highest (yellow).

    Args:
        image: [3 H W] or [1 H W], from 0 to 1.
        scores: [N] one for each patch, row by row over the grid; NaN for a patch without one (it has left), which is
            shown in grey alone.
        grid: Rows and columns of patches; rows * columns = N, and they divide H and W.
        min_side: The picture is enlarged by a whole number until its shorter side has that many pixels.

    Returns:
        An RGB picture of a multiple of H x W pixels.

    Raises:
        ValueError: Shapes do not fit, or every score is NaN.
    """
    from matplotlib import colormaps

    pixels = checked_image(image, grid)
    patches = grid[0] * grid[1]
    if scores.shape != (patches,):
        raise ValueError(f"scores have shape {list(scores.shape)}, expected [{patches}]: patches of the grid")
    values = scores.detach().float().cpu()
    known = values.isfinite()
    if not known.any():
        raise ValueError("scores are all NaN; give one for at least one patch")
    low, high = values[known].min(), values[known].max()
    share = torch.where(known, (values - low) / (high - low).clamp_min(1e-12), torch.zeros(()))
    colours = torch.as_tensor(colormaps[COLOURS](share.numpy())[:, :3]).float().T  # [3 N]
    size = (pixels.shape[1], pixels.shape[2])
    heat = torch.stack([patch_pixels(channel, grid, size) for channel in colours])
    grey = pixels.mean(0, keepdim=True).expand(3, -1, -1)
    shown = patch_pixels(known, grid, size)
    return to_picture(torch.where(shown, _OPACITY * heat + (1 - _OPACITY) * grey, grey), min_side)
