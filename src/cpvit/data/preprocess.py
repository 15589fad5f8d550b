"""How images become the tensors a model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from PIL import Image
from torch import Tensor, nn

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise, as in the model's own evaluation.

    Attributes:
        image_size: Height and width of the result.
        mean: Subtracted per channel, on a scale from 0 to 1.
        std: Divided by, per channel.
        interpolation: Of the resize, by Pillow's name.
        crop_pct: The part of the resized image that the crop keeps, per side.
        crop_mode: timm's crop mode; "center" except for a few models.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size is {self.image_size}; expected height and width, both at least 1")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"mean is {self.mean} and std is {self.std}; expected three values each (RGB), std above 0"
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"interpolation is {self.interpolation!r}; expected one of {', '.join(_INTERPOLATIONS)}"
            )
        if self.crop_pct <= 0:
            raise ValueError(f"crop_pct is {self.crop_pct}; expected a fraction above 0, usually at most 1")
        if self.crop_mode not in _CROP_MODES:
            raise ValueError(f"crop_mode is {self.crop_mode!r}; expected one of {', '.join(_CROP_MODES)}")

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        image_size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
    ) -> Preprocessing:
        """What the model's ``pretrained_cfg`` says it was trained with; each value may be overridden.

        ``create_model`` sets it for the models of all libraries. A model without one needs ``image_size``, ``mean`` and
        ``std``.

        The size is the one the model now takes, which differs from the pretrained one if it was created so.

        Example:
            >>> Preprocessing.from_model(model, mean=(0.5,) * 3, std=(0.5,) * 3)  # doctest: +SKIP
        """
        config = _timm_config(model, known=mean is not None and std is not None)
        size = image_size or _model_size(model) or config.get("input_size", (3,))[1:]
        return cls(
            image_size=_checked_size(model, size),
            mean=_floats(config["mean"] if mean is None else mean),
            std=_floats(config["std"] if std is None else std),
            interpolation=interpolation or config["interpolation"],
            crop_pct=float(config["crop_pct"] if crop_pct is None else crop_pct),
            crop_mode=config["crop_mode"],
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`."""
        return cls(
            image_size=_pair(values["image_size"]),
            mean=_floats(values["mean"]),
            std=_floats(values["std"]),
            interpolation=values["interpolation"],
            crop_pct=values["crop_pct"],
            crop_mode=values["crop_mode"],
        )

    def to_dict(self) -> dict[str, Any]:
        """All values, ready for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    def transform(self) -> Transform:
        """timm's evaluation transform: an RGB image -> float32 `[3 H W]`."""
        return self._timm_transform(normalize=True)

    def pixel_transform(self) -> Transform:
        """The same without normalisation: an RGB image -> uint8 `[3 H W]`."""
        return self._timm_transform(normalize=False)

    def _timm_transform(self, *, normalize: bool) -> Transform:
        from timm.data import create_transform

        transform = create_transform(
            input_size=(3, *self.image_size),
            is_training=False,
            normalize=normalize,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return cast("Transform", transform)


def _timm_config(model: nn.Module, *, known: bool) -> dict[str, Any]:
    """timm's data config; ``known``: mean and std are given, so that the rest may be what is usual."""
    if not getattr(model, "pretrained_cfg", None):
        if known:
            return dict(_USUAL)
        raise ValueError(
            f"{type(model).__name__} has no pretrained_cfg, so its preprocessing is unknown; "
            "create it with create_model, or give image_size, mean and std (--mean, --std)"
        )
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    return config


_USUAL = {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}


def _model_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width that the patch embedding was built for; None if it takes any."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return None if size is None else _pair(size)


def _checked_size(model: nn.Module, size: int | Sequence[int]) -> tuple[int, int]:
    """Refuse a size that the model's patch embedding would only reject at the first batch."""
    expected = _model_size(model)
    strict = getattr(getattr(model, "patch_embed", None), "strict_img_size", False)
    height_width = _pair(size)
    if strict and expected is not None and height_width != expected:
        raise ValueError(
            f"image_size is {height_width} but the model takes {expected} only; "
            f"create it with img_size={height_width}, or with dynamic_img_size=True"
        )
    return height_width


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if len(size) != 2:
        raise ValueError(f"image_size is {tuple(size)}; expected one number, or height and width")
    return int(size[0]), int(size[1])


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
