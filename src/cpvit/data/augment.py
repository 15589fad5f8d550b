"""How training changes images: per image before batching, and between the images of a batch.

All of it is timm's (`create_transform`, `Mixup`). timm draws from the global generators of python, numpy and
torch; here each image and each batch gets its own seed, and the global state is put back afterwards. So the
same sample is augmented alike in any worker, and neither training nor resuming notices.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cpvit.data.preprocess import Preprocessing, Transform


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image, in timm's terms.

    Attributes:
        rand_augment: RandAugment (arXiv 1909.13719) in timm's notation, such as "rand-m9-mstd0.5-inc1"; None
            for none.
        random_resized_crop: Crop a part of random area and aspect ratio and resize it; else the resize and
            crop of evaluation.
        scale: Smallest and largest area of that part, as fractions of the image.
        flip: Probability of a horizontal flip.
        color_jitter: Strength of random brightness, contrast and saturation. timm does not combine it with
            RandAugment, so neither does this.
        random_erasing: Probability that a rectangle is replaced by noise (arXiv 1708.04896), after
            normalisation.
    """

    rand_augment: str | None = None
    random_resized_crop: bool = True
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    color_jitter: float = 0.0
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "random_erasing"):
            _check_probability(name, getattr(self, name))
        if self.color_jitter < 0:
            raise ValueError(f"color_jitter is {self.color_jitter}; expected a strength of at least 0")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}; expected two fractions of the image's area, in order")
        if self.rand_augment is None:
            return
        if not self.rand_augment.startswith("rand-"):
            raise ValueError(
                f"rand_augment is {self.rand_augment!r}; expected timm's notation, such as "
                "'rand-m9-mstd0.5-inc1', or None"
            )
        if self.color_jitter > 0:
            raise ValueError(
                f"color_jitter is {self.color_jitter} beside rand_augment {self.rand_augment!r}, where timm "
                "leaves it out; set one of the two"
            )

    def transform(self, preprocessing: Preprocessing) -> Transform:
        """An RGB image -> float32 `[3 H W]`; draws from the global generators, see `seed_generators`.

        Size, interpolation, mean and std are those of `preprocessing`; its crop is used only without
        `random_resized_crop`.
        """
        from timm.data import create_transform
        from torchvision.transforms import Compose

        common = {
            "input_size": (3, *preprocessing.image_size),
            "interpolation": preprocessing.interpolation,
            "mean": preprocessing.mean,
            "std": preprocessing.std,
        }
        try:
            crop_and_flip, color, finish = create_transform(
                **common,
                is_training=True,
                separate=True,
                scale=self.scale,
                hflip=self.flip,
                color_jitter=self.color_jitter or None,
                auto_augment=self.rand_augment,
                re_prob=self.random_erasing,
                re_mode="pixel",
            )
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"timm does not understand rand_augment {self.rand_augment!r}: {error}; "
                "expected something like 'rand-m9-mstd0.5-inc1'"
            ) from error
        _allow_zero_bits(color)
        _, *flip = crop_and_flip.transforms
        if self.random_resized_crop:
            return cast("Transform", Compose([crop_and_flip, color, finish]))
        evaluation = create_transform(
            **common,
            is_training=False,
            normalize=False,
            crop_pct=preprocessing.crop_pct,
            crop_mode=preprocessing.crop_mode,
        )
        # The last step makes a tensor, which is for `finish` to do.
        *resize_and_crop, _ = evaluation.transforms
        return cast("Transform", Compose([*resize_and_crop, *flip, color, finish]))


@dataclass(frozen=True)
class Mixing:
    """Blending the images of a batch in pairs, first with last, and their labels alike; timm's `Mixup`.

    Attributes:
        mixup: alpha of mixup (arXiv 1710.09412); 0 is off.
        cutmix: alpha of CutMix (arXiv 1905.04899); 0 is off.
        probability: Of mixing a batch at all.
        switch_probability: Of CutMix where both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} is {value}; expected an alpha of at least 0 (0 is off)")
        for name in ("probability", "switch_probability"):
            _check_probability(name, getattr(self, name))

    @property
    def active(self) -> bool:
        """Whether any batch is ever mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0


@dataclass(frozen=True)
class Mixer:
    """Mixing for a head of `num_classes` outputs."""

    mixing: Mixing
    num_classes: int
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; expected a fraction below 1")

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mixes `images` `[B 3 H W]` in place (B even); gives targets `[B classes]` that sum to one.

        The targets are None if there is neither mixing nor smoothing, since then the labels say it all.
        """
        from timm.data.mixup import Mixup, mixup_target

        if self.mixing.active:
            mixup: Any = Mixup(
                mixup_alpha=self.mixing.mixup,
                cutmix_alpha=self.mixing.cutmix,
                prob=self.mixing.probability,
                switch_prob=self.mixing.switch_probability,
                label_smoothing=self.label_smoothing,
                num_classes=self.num_classes,
            )
            mixed, targets = mixup(images, labels)
            return mixed, targets
        if self.label_smoothing > 0:
            return images, mixup_target(labels, self.num_classes, smoothing=self.label_smoothing)
        return images, None


def _allow_zero_bits(color: Any) -> None:
    """timm's strongest posterize keeps 0 bits, which Pillow 13 refuses and those before it made black."""
    for step in color.transforms:
        for op in getattr(step, "ops", ()):
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize


def _posterize(image: Any, bits: int, **_: object) -> Any:
    from PIL import Image, ImageOps

    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; expected a probability from 0 to 1")


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Puts the global generators of python, numpy and torch (CPU) back as they were."""
    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(tensor)


def seed_generators(seeds: np.random.SeedSequence) -> None:
    """Seed the same three; use inside `preserved_generators`.

    `torch.manual_seed` would also seed every GPU, whose generators belong to training.
    """
    python, array, tensor = (int(word) for word in seeds.generate_state(3))
    random.seed(python)
    np.random.seed(array)
    torch.default_generator.manual_seed(tensor)
