"""Real handwritten digits, small and off-centre on a cluttered canvas: the images and the model of the demo.

The digits are scikit-learn's bundled 1,797 scans of 8x8 pixels, so nothing is downloaded. Each is drawn about
a quarter as wide as the canvas, and the rest is filled with things that are *not* digits but look like parts
of one: fragments cut from other digits, short strokes and arcs of the same contrast, soft blobs and noise.
Most patches are therefore background that can be pruned, but not all of it is darker than the digit.

Legend: B images, K sprites per image, S pixels per side of a sprite or canvas.
"""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CANVAS = 96
PATCH = 8
GRID = CANVAS // PATCH
WEIGHTS = "digits.safetensors"

_WIDTH = 96  # channels of every token
_SPLIT_SEED = 20220307  # of the split only: the same digits are held out whatever else changes
_TEST_SHARE = 0.2
_DIGIT = 32  # pixels per side of the sprite a digit is drawn in; its ink fills about 26 of them
_SMALL = 14  # pixels per side of the sprite of a fragment or stroke
_FRAGMENT_REACH = 5.0  # half the width of the largest fragment: too small to show a whole digit
_CLEARANCE = 14.0  # clutter whose centre is closer than this to the digit's could change its class

Split = Literal["train", "test"]


def cluttered_digits(
    split: Split, *, count: int | None = None, seed: int = 0, side: int = CANVAS
) -> tuple[Tensor, Tensor]:
    """Cluttered canvases and their labels; the same arguments always give the same images.

    Args:
        split: Which scans to draw. No scan is in both, neither as the digit nor as a fragment in the clutter.
        count: How many images; None draws every scan of the split once. More than that draws scans again,
            each time on another canvas.
        seed: Of the order, the poses and the clutter.
        side: Pixels per side of the canvas; the clutter is equally dense on all of them.

    Returns:
        Images [B 3 S S], float32, from -1 to 1 (mean 0.5 and deviation 0.5 already applied), and labels [B].

    Example:
        >>> images, labels = cluttered_digits("test", count=4, seed=0)
        >>> images.shape
        torch.Size([4, 3, 96, 96])
    """
    _check(split, count, side)
    scans, labels = _scans(split)
    random = torch.Generator().manual_seed(seed)
    order = _order(len(labels), len(labels) if count is None else count, random)
    corner = torch.randint(side - _DIGIT + 1, (len(order), 2), generator=random)
    ink = _compose(scans, order, corner, side, random)
    return _colour(ink, random), labels[order]


def to_unit(images: Tensor) -> Tensor:
    """Undo the normalisation: images from -1..1 to 0..1, for drawing."""
    return (images * 0.5 + 0.5).clamp(0, 1)


def digits_model() -> Any:
    """The demo's Vision Transformer with fresh weights: 8 blocks, 144 patches and a class token.

    The only change to the standard model is the stem: three convolutions with stride 2 instead of one with stride 8.
    With 1,438 training digits, a linear stem must learn every offset of a digit to the patch grid separately: it
    reached 68% after 104 epochs, this stem 96% after 54.
    """
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=CANVAS,
        patch_size=PATCH,
        num_classes=10,
        embed_dim=_WIDTH,
        depth=8,
        num_heads=3,
        mlp_ratio=3.0,
    )
    model.patch_embed.proj = ConvStem()
    return model


class ConvStem(nn.Sequential):
    """Images to patches: [B 3 S S] -> [B C S/8 S/8]; each patch sees a few pixels of its neighbours."""

    in_channels = 3  # as of the convolution that it replaces; read when the model is pruned

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(self.in_channels, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, 48, 3, stride=2, padding=1),
            nn.BatchNorm2d(48),
            nn.GELU(),
            nn.Conv2d(48, _WIDTH, 3, stride=2, padding=1),
        )


def load_digits_model() -> Any:
    """The demo's Vision Transformer with the weights that come with the package, in evaluation mode."""
    from safetensors.torch import load

    model = digits_model()
    packed = load((resources.files("cpvit.demo") / WEIGHTS).read_bytes())
    model.load_state_dict(packed)  # copies the half precision numbers into single precision
    return model.eval()


def weights_metadata() -> Mapping[str, str]:
    """Metadata of the packaged weights: the command that trained them, and the accuracy it printed."""
    from safetensors import safe_open

    with (
        resources.as_file(resources.files("cpvit.demo") / WEIGHTS) as path,
        safe_open(path, framework="pt") as file,
    ):
        return dict(file.metadata())


def _check(split: str, count: int | None, side: int) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, or None for every digit of the split; got {count}")
    if side < _DIGIT or side % PATCH:
        raise ValueError(f"side must be a multiple of {PATCH} and at least {_DIGIT} pixels, got {side}")


@cache
def _scans(split: Split) -> tuple[Tensor, Tensor]:
    """The scans [M 1 8 8] from 0 to 1 and labels [M] of one split, stratified by class."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = torch.as_tensor(bunch.target, dtype=torch.long)
    index = _split_index(labels, split)
    return torch.as_tensor(bunch.images[index.numpy()], dtype=torch.float32)[:, None] / 16, labels[index]


def _split_index(labels: Tensor, split: Split) -> Tensor:
    """Indices of the scans of the split: a fifth of each class, by a fixed shuffle, is the test split."""
    random = torch.Generator().manual_seed(_SPLIT_SEED)
    parts = []
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=random)]
        held_out = round(_TEST_SHARE * len(members))
        parts.append(members[:held_out] if split == "test" else members[held_out:])
    return torch.cat(parts).sort().values


def _order(available: int, count: int, random: torch.Generator) -> Tensor:
    """`count` scan numbers: whole shuffles one after another, so that none repeats before all were drawn."""
    rounds = -(-count // available)
    return torch.cat([torch.randperm(available, generator=random) for _ in range(rounds)])[:count]


def _compose(scans: Tensor, order: Tensor, corner: Tensor, side: int, random: torch.Generator) -> Tensor:
    """Ink [B S S] from 0 to 1: the chosen digit of each image, its top left corner at [B 2], over clutter."""
    images, corner = len(order), corner[:, None]
    digit = _render(scans[order], random) * _uniform((images, 1, 1), 0.75, 1.0, random)
    ink = _soft_clutter(images, side, random)
    pieces = round(16 * (side / CANVAS) ** 2)
    for sprites in (_fragments(scans, images, pieces, random), _strokes(images, pieces, random)):
        at = torch.randint(-_SMALL // 2, side - _SMALL // 2, (*sprites.shape[:2], 2), generator=random)
        distance = (at - corner + (_SMALL - _DIGIT) / 2).float().norm(dim=-1)
        ink = _paste(ink, sprites * (distance > _CLEARANCE)[..., None, None], at)
    return _paste(ink, digit[:, None], corner)


def _render(scans: Tensor, random: torch.Generator) -> Tensor:
    """Draw scans [B 1 8 8] in sprites [B S S], each slightly turned, slanted and scaled."""
    images = len(scans)
    turn, slant = _uniform((images,), -0.2, 0.2, random), _uniform((images,), -0.15, 0.15, random)
    scale = _DIGIT / (8 * _uniform((images,), 2.9, 3.5, random))  # the sprite in widths of the drawn scan
    cos, sin, zero = scale * turn.cos(), scale * turn.sin(), torch.zeros(images)
    theta = torch.stack([cos, slant * cos - sin, zero, sin, slant * sin + cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [images, 1, _DIGIT, _DIGIT], align_corners=False)
    drawn = F.grid_sample(scans, grid, mode="bicubic", align_corners=False)[:, 0]
    return _sharpen(drawn)


def _sharpen(drawn: Tensor) -> Tensor:
    """Sharpen the blurred strokes of an eightfold enlargement."""
    edge = ((drawn - 0.2) / 0.5).clamp(0, 1)
    return edge * edge * (3 - 2 * edge)


def _fragments(scans: Tensor, images: int, pieces: int, random: torch.Generator) -> Tensor:
    """Round cuts [B K S S], at most 10 pixels wide, out of digits of the same split."""
    total = images * pieces
    # Cut 128 rendered digits in many places: as varied as one digit per fragment, and far cheaper.
    sheet = _render(scans[torch.randint(len(scans), (128,), generator=random)], random)
    which = torch.randint(len(sheet), (total,), generator=random)
    centre = torch.randint(4, _DIGIT - _SMALL - 3, (2, total), generator=random)
    step = torch.arange(_SMALL)
    rows, columns = centre[0, :, None] + step, centre[1, :, None] + step
    cut = sheet[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    reach = _uniform((total, 1, 1), 3.0, _FRAGMENT_REACH, random)
    cut = cut * ((reach - _radius()) * 2).clamp(0, 1)
    return (cut * _uniform((total, 1, 1), 0.6, 1.0, random)).view(images, pieces, _SMALL, _SMALL)


def _strokes(images: int, pieces: int, random: torch.Generator) -> Tensor:
    """Short arcs [B K S S], from hooks to nearly straight lines, of a digit's stroke width."""
    shape = (images, pieces, 1, 1)
    angle, bend = _uniform(shape, 0, 2 * torch.pi, random), _uniform(shape, 4, 40, random)
    axis = torch.arange(_SMALL) - (_SMALL - 1) / 2
    across = (axis[:, None] - bend * angle.sin()) ** 2 + (axis[None, :] - bend * angle.cos()) ** 2
    off_line = (across.sqrt() - bend).abs()
    width, reach = _uniform(shape, 1.0, 2.2, random), _uniform(shape, 3.0, 6.0, random)
    stroke = (width + 0.5 - off_line).clamp(0, 1) * (reach - _radius()).clamp(0, 1)
    return stroke * _uniform(shape, 0.4, 1.0, random)


def _soft_clutter(images: int, side: int, random: torch.Generator) -> Tensor:
    """Blurred blobs and grain [B S S], fainter than any stroke."""
    coarse = torch.rand(images, 1, max(2, side // 12), max(2, side // 12), generator=random)
    blobs = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)[:, 0]
    grain = torch.randn(images, side, side, generator=random)
    return (0.25 * blobs.clamp(0, 1) ** 2 + 0.05 * grain).clamp(0, 1)


def _paste(ink: Tensor, sprites: Tensor, corner: Tensor) -> Tensor:
    """Lay sprites [B K S S] on ink with their top left corners at [B K 2]; the stronger ink of two wins.

    Corners may lie outside the canvas: what falls off is cut.
    """
    images, side = ink.shape[:2]
    step = torch.arange(sprites.shape[-1])
    rows, columns = corner[..., 0, None] + step, corner[..., 1, None] + step
    rows, columns = rows[..., :, None], columns[..., None, :]
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    pixel = torch.arange(images).view(-1, 1, 1, 1) * side + rows
    pixel = (pixel * side + columns)[inside]
    return ink.flatten().scatter_reduce(0, pixel, sprites[inside], "amax").view_as(ink)


def _colour(ink: Tensor, random: torch.Generator) -> Tensor:
    """Mix a dark ground and a light ink colour per image: ink [B S S] -> normalised images [B 3 S S]."""
    shape = (len(ink), 3, 1, 1)
    ground, light = _uniform(shape, 0.04, 0.26, random), _uniform(shape, 0.7, 1.0, random)
    return (ground + (light - ground) * ink[:, None] - 0.5) / 0.5


def _radius() -> Tensor:
    """Distance [S S] of each pixel of a small sprite from its centre."""
    axis = torch.arange(_SMALL) - (_SMALL - 1) / 2
    return (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()


def _uniform(shape: tuple[int, ...], low: float, high: float, random: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=random)
