"""Draw which patches survive: one row per image, one column per stage of the pruning.

The input is images and positions, so the trace of any method can be drawn. Matplotlib's object interface is used: no
window opens, and figures of the caller are not changed.

Legend: B images, L blocks, N patches of the whole grid, K patches that leave a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cpvit.files import replacing
from cpvit.pictures.patches import MIN_SIDE, paint_block, to_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

MAX_STAGES = 6

_CELL_INCHES = 1.55
_DPI = 120


class _Stage(NamedTuple):
    heading: str
    positions: Tensor  # [B K]
    carrier: Tensor | None  # [B N] index of the token that each patch was merged into


def draw_survivors(
    images: Tensor,
    survivors: Sequence[Tensor],
    grid: tuple[int, int],
    *,
    path: Path | str,
    blocks: Sequence[int] | None = None,
    titles: Sequence[str] | None = None,
    carriers: Sequence[Tensor | None] | None = None,
) -> Path:
    """Write a PNG that shows, for each image, which patches survive each stage.

    A stage is a block that removes or merges patches. Of more than six, six are picked evenly.

    Args:
        images: [B 3 H W] or [B 1 H W], from 0 to 1.
        survivors: For each of L blocks [B K], the original positions of the patches that leave it, counted
            row by row over the grid. K may differ from block to block.
        grid: Rows and columns of patches; rows * columns = N.
        path: The PNG file to write; its folder is created if missing.
        blocks: Blocks to draw instead of the stages, counted from 0.
        titles: A few words for each image, written beside its row.
        carriers: For methods that merge patches: for each block [B N], the index of the token that each original
            patch was merged into, or None. Patches of the same token get their mean colour and a line around them.

    Example:
        >>> draw_survivors(images, trace.survivors, (14, 14), path="survivors.png")
    """
    _check(images, survivors, grid, titles, carriers)
    chosen = (
        stages([kept.shape[1] for kept in survivors], grid[0] * grid[1]) if blocks is None else tuple(blocks)
    )
    _check_blocks(chosen, len(survivors))
    columns = [_stage(block, survivors, grid, carriers) for block in chosen]
    return _write_figure(
        images.detach().float().cpu().expand(-1, 3, -1, -1), columns, grid, titles, Path(path)
    )


def stages(counts: Sequence[int], patches: int, *, limit: int = MAX_STAGES) -> tuple[int, ...]:
    """Blocks after which fewer patches are left than before, at most `limit` of them, evenly picked.

    The first and the last are always among them; if nothing was pruned, only the last block is returned.

    Example:
        >>> stages([16, 12, 12, 8], 16)
        (1, 3)
    """
    if not counts:
        raise ValueError("counts is empty; give the number of patches that leave each block")
    before = (patches, *counts[:-1])
    changed = [block for block, count in enumerate(counts) if count != before[block]] or [len(counts) - 1]
    if len(changed) <= limit:
        return tuple(changed)
    return tuple(changed[round(step * (len(changed) - 1) / (limit - 1))] for step in range(limit))


def _check(
    images: Tensor,
    survivors: Sequence[Tensor],
    grid: tuple[int, int],
    titles: Sequence[str] | None,
    carriers: Sequence[Tensor | None] | None,
) -> None:
    _check_images(images, grid)
    if not survivors:
        raise ValueError("survivors is empty; give one tensor of positions for each block")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles has {len(titles)} entries but there are {len(images)} images")
    if carriers is not None and len(carriers) != len(survivors):
        raise ValueError(f"carriers has {len(carriers)} blocks but survivors has {len(survivors)}")
    patches = grid[0] * grid[1]
    for block, kept in enumerate(survivors):
        _check_positions(block, kept, len(images), patches)
    for block, carrier in enumerate(carriers or ()):
        if carrier is not None and tuple(carrier.shape) != (len(images), patches):
            raise ValueError(
                f"carriers of block {block} have shape {list(carrier.shape)}, expected "
                f"[{len(images)}, {patches}]: images, patches of the grid"
            )


def _check_images(images: Tensor, grid: tuple[int, int]) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [B 3 H W] or [B 1 H W], got shape {list(images.shape)}")
    if not len(images):
        raise ValueError("images is empty; give at least one")
    if images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"images must lie between 0 and 1, got {images.min():.3g} to {images.max():.3g}; "
            "undo the normalisation first"
        )
    rows, columns = grid
    if images.shape[2] % rows or images.shape[3] % columns:
        raise ValueError(
            f"images of {images.shape[2]}x{images.shape[3]} pixels do not divide into a grid of "
            f"{rows}x{columns} patches"
        )


def _check_positions(block: int, kept: Tensor, images: int, patches: int) -> None:
    if kept.ndim != 2 or kept.shape[0] != images:
        raise ValueError(
            f"survivors of block {block} have shape {list(kept.shape)}, expected [{images}, K]: "
            "one row for each image"
        )
    if kept.is_floating_point() or kept.dtype == torch.bool:
        raise TypeError(
            f"survivors of block {block} must be whole numbers, positions in the grid; got {kept.dtype}"
        )
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < patches:
        raise ValueError(
            f"survivors of block {block} run from {int(kept.min())} to {int(kept.max())}, but the grid has "
            f"positions 0 to {patches - 1}; leave prefix tokens out"
        )


def _check_blocks(blocks: Sequence[int], depth: int) -> None:
    wrong = [block for block in blocks if not 0 <= block < depth]
    if wrong or not blocks:
        raise ValueError(f"blocks must name at least one block from 0 to {depth - 1}, got {list(blocks)}")


def _stage(
    block: int, survivors: Sequence[Tensor], grid: tuple[int, int], carriers: Sequence[Tensor | None] | None
) -> _Stage:
    kept, patches = survivors[block], grid[0] * grid[1]
    heading = f"after block {block + 1}\n{kept.shape[1]} of {patches} patches"
    return _Stage(heading, kept, None if carriers is None else carriers[block])


def _write_figure(
    images: Tensor, columns: Sequence[_Stage], grid: tuple[int, int], titles: Sequence[str] | None, path: Path
) -> Path:
    axes, figure = _axes(len(images), 1 + len(columns), images.shape[2] / images.shape[3], titles)
    axes[0][0].set_title("image", fontsize=9, linespacing=1.35)
    for column, stage in enumerate(columns, start=1):
        axes[0][column].set_title(stage.heading, fontsize=9, linespacing=1.35)
    for row, image in enumerate(images):
        _show(axes[row][0], to_picture(image, MIN_SIDE))
        for column, stage in enumerate(columns, start=1):
            carrier = None if stage.carrier is None else stage.carrier[row]
            _show(axes[row][column], paint_block(image, stage.positions[row], carrier, grid))
        if titles is not None:
            axes[row][0].set_ylabel(titles[row], rotation=0, ha="right", va="center", labelpad=8, fontsize=9)
    looks = {"dpi": _DPI, "bbox_inches": "tight", "pad_inches": 0.12, "facecolor": "white"}
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", **looks)
    return path


def _axes(rows: int, columns: int, aspect: float, titles: Sequence[str] | None) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    label_width = 0.075 * max((len(line) for title in titles or () for line in title.split("\n")), default=0)
    size = (columns * _CELL_INCHES + label_width, rows * _CELL_INCHES * aspect + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.035, h_pad=0.035, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    return figure.subplots(rows, columns, squeeze=False), figure


def _show(axes: Axes, picture: Image) -> None:
    axes.imshow(picture, interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
