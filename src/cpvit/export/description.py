"""What an exported file is: written into its metadata, and with the parity report as JSON beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cpvit.data import Preprocessing
from cpvit.plans.json_text import parse_json
from cpvit.plans.plan import Plan, plan_from_values

Format: TypeAlias = Literal["onnx", "openvino", "torch"]
Precision: TypeAlias = Literal["float32", "int8", "int8-weights"]

SUFFIXES: Mapping[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
KEY = "cpvit"
"""Of the description in a file's metadata."""
VERSION = 1
"""Of the description."""
INPUT, OUTPUT = "images", "logits"
"""Names of the graph's input and output."""


class ExportError(ValueError):
    """A model could not be exported, or an exported file not be used; the message says why and what to do."""


@dataclass(frozen=True)
class Description:
    """What a file holds and what it expects."""

    format: Format
    precision: Precision
    """"int8": weights and activations of the linear layers; "int8-weights": weights alone."""
    model: str
    plan: Plan | None
    """None for the dense model."""
    macs: int
    """Multiply-accumulates of one image, counted by torch."""
    weights_sha256: str
    """Of the torch model's state_dict, dense or with its heads cut."""
    image_size: tuple[int, int]
    """Height and width."""
    batch_size: int | None
    """None for any."""
    preprocessing: Preprocessing | None
    """How a picture becomes the input; None if it is not known."""
    normalized_inside: bool
    """True: the input is [B H W 3] uint8 RGB. False: [B 3 H W] float32, normalised by mean and std."""
    num_outputs: int
    """Classes; features if the model has no head."""
    classes: tuple[str, ...] | None = None
    """Their names, where they are known."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    version: int = VERSION

    @property
    def input_shape(self) -> tuple[int | str, ...]:
        """With "batch" where any number of images may come."""
        batch = "batch" if self.batch_size is None else self.batch_size
        sides = self.image_size
        return (batch, *sides, 3) if self.normalized_inside else (batch, 3, *sides)

    def values(self) -> dict[str, Any]:
        """Ready for JSON; says the input's name, type and shape as well, for readers without cpvit."""
        own = dataclasses.asdict(self) | {
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict(),
            "versions": dict(self.versions),
        }
        return own | {
            "input": {
                "name": INPUT,
                "dtype": "uint8" if self.normalized_inside else "float32",
                "shape": list(self.input_shape),
            },
            "output": {"name": OUTPUT, "dtype": "float32", "shape": [self.input_shape[0], self.num_outputs]},
        }

    def to_json(self) -> str:
        """Without loss."""
        return json.dumps(self.values())

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Read :meth:`to_json`.

        Raises:
            ValueError: Not a description, or one of a later version.
        """
        values = parse_json(text)
        if not isinstance(values, dict) or "weights_sha256" not in values:
            raise ValueError("not a description of an exported model")
        if values.get("version", 0) > VERSION:
            raise ValueError(
                f"version {values['version']} is newer than this cpvit reads ({VERSION}); upgrade"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        found: dict[str, Any] = {name: value for name, value in values.items() if name in known}
        found["plan"] = None if found["plan"] is None else plan_from_values(found["plan"])
        preprocessing = found["preprocessing"]
        found["preprocessing"] = None if preprocessing is None else Preprocessing.from_dict(preprocessing)
        found["image_size"] = tuple(found["image_size"])
        found["classes"] = None if found["classes"] is None else tuple(found["classes"])
        return cls(**found)


@dataclass(frozen=True)
class Parity:
    """What the file's own runtime answers, next to torch in float32."""

    images: int
    real_images: bool
    """False: noise."""
    max_difference: float
    """Largest of any output."""
    typical_difference: float
    """Median over the images of the largest difference, over the largest output."""
    agreement: float
    """Share of the images with the same largest output."""
    kl: float
    """Mean divergence in nats, if the outputs are logits."""
    distance: float
    """See :func:`cpvit.measure.metrics.logit_distance`; a better guide than KL on few images."""
    most_kl: float
    """What was allowed."""


def beside(path: Path) -> Path:
    """Where the description and the parity report lie: ``model.onnx`` -> ``model.onnx.json``."""
    return path.with_name(path.name + ".json")
