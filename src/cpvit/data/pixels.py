"""Images as bytes, a quarter of what normalised ones take, and the way between the two, exact to the last bit."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cpvit.data.preprocess import Preprocessing


class Normalizer:
    """uint8 pixels -> what the model takes, as :meth:`Preprocessing.transform` does it, on the model's device."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device, dtype: torch.dtype) -> None:
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
        self._device = device
        self._dtype = dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """[B 3 H W]."""
        images = pixels.to(self._device, non_blocking=True).float().div_(255)
        return images.sub_(self._mean).div_(self._std).to(self._dtype)


def check_normalizer(preprocessing: Preprocessing) -> None:
    """Raise RuntimeError if timm's transform gives other values than :class:`Normalizer`, as another release might."""
    noise = np.random.default_rng(0).integers(0, 256, (*preprocessing.image_size, 3), np.uint8)
    picture = Image.fromarray(noise)
    pixels = preprocessing.pixel_transform()(picture)[None]
    ours = Normalizer(preprocessing, torch.device("cpu"), torch.float32)(pixels)
    if not torch.equal(ours[0], preprocessing.transform()(picture)):
        raise RuntimeError(
            "timm's evaluation transform is not what cpvit takes it for (resize, crop, divide by 255, mean, "
            "std); report this with your versions of timm and torchvision"
        )


def pixels_of(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The bytes that normalised images were made of: float32 [B 3 H W] on the CPU -> uint8."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
