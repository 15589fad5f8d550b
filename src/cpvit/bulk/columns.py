"""What a model gives for a batch, as columns of Arrow. Everything else of a run does not know what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpvit.bulk.features import Tokens
from cpvit.bulk.requirements import required

DtypeOut: TypeAlias = Literal["float32", "float16", "int8"]
Array: TypeAlias = npt.NDArray[Any]


class Columns(Protocol):
    """Turns what a model gives into columns."""

    def fields(self, width: int) -> list[tuple[str, Any]]:
        """Name and Arrow type of each column; ``width``: classes or channels of the model's output."""
        ...

    def arrays(self, output: Any) -> dict[str, Any]:
        """The columns of the b images of a batch."""
        ...


@dataclass(frozen=True)
class TopClasses:
    """The k likeliest classes, likeliest first, with their probabilities."""

    k: int = 5

    def fields(self, width: int) -> list[tuple[str, Any]]:
        """``classes`` and ``probabilities``, k of each.

        Raises:
            ValueError: The model has fewer classes.
        """
        if not 1 <= self.k <= width:
            raise ValueError(f"--top-k is {self.k}; expected 1 to {width}, the classes of the model")
        pyarrow = required("pyarrow")
        return [
            ("classes", pyarrow.list_(pyarrow.int32(), self.k)),
            ("probabilities", pyarrow.list_(pyarrow.float32(), self.k)),
        ]

    def arrays(self, output: Tensor) -> dict[str, Any]:
        """Of logits [b K]."""
        best = output.float().softmax(dim=-1).topk(self.k, dim=-1)
        return {
            "classes": _vectors(best.indices.to(torch.int32).cpu().numpy()),
            "probabilities": _vectors(best.values.cpu().numpy()),
        }


@dataclass(frozen=True)
class Embedding:
    """One vector an image, in float32, float16, or int8 with a scale: value = int8 * scale."""

    dtype: DtypeOut = "float32"

    def fields(self, width: int) -> list[tuple[str, Any]]:
        """``embedding``, and ``scale`` for int8."""
        pyarrow = required("pyarrow")
        found = [("embedding", pyarrow.list_(arrow_type(self.dtype), width))]
        return [*found, ("scale", pyarrow.float32())] if self.dtype == "int8" else found

    def arrays(self, output: Tensor) -> dict[str, Any]:
        """Of features [b C]."""
        values, scales = stored(output, self.dtype)
        found = {"embedding": _vectors(values)}
        return found if scales is None else {**found, "scale": required("pyarrow").array(scales)}


@dataclass(frozen=True)
class TokenList:
    """All tokens of an image with their positions and sizes; int8 has a scale for each token."""

    dtype: DtypeOut = "float32"

    def fields(self, width: int) -> list[tuple[str, Any]]:
        """``tokens``, ``positions``, ``sizes``, and ``scales`` for int8."""
        pyarrow = required("pyarrow")
        found = [
            ("tokens", pyarrow.list_(pyarrow.list_(arrow_type(self.dtype), width))),
            ("positions", pyarrow.list_(pyarrow.int32())),
            ("sizes", pyarrow.list_(pyarrow.float32())),
        ]
        return [*found, ("scales", pyarrow.list_(pyarrow.float32()))] if self.dtype == "int8" else found

    def arrays(self, output: list[Tokens]) -> dict[str, Any]:
        """Of the tokens of each image: those of two stages differ in number."""
        pyarrow = required("pyarrow")
        values, scales = stored(torch.cat([one.values.flatten(0, 1) for one in output]), self.dtype)
        lengths = [one.values.shape[1] for one in output for _ in range(len(one.values))]
        offsets = pyarrow.array(np.cumsum([0, *lengths]), pyarrow.int32())
        positions = torch.cat([one.positions.flatten() for one in output]).to(torch.int32)
        sizes = torch.cat([one.sizes.flatten() for one in output])
        columns = {
            "tokens": _vectors(values),
            "positions": pyarrow.array(positions.cpu().numpy()),
            "sizes": pyarrow.array(sizes.cpu().numpy()),
        }
        if scales is not None:
            columns["scales"] = pyarrow.array(scales)
        return {name: pyarrow.ListArray.from_arrays(offsets, column) for name, column in columns.items()}


def arrow_type(dtype: DtypeOut) -> Any:
    """Of one value."""
    pyarrow = required("pyarrow")
    return {"float32": pyarrow.float32(), "float16": pyarrow.float16(), "int8": pyarrow.int8()}[dtype]


def stored(values: Tensor, dtype: DtypeOut) -> tuple[Array, Array | None]:
    """Vectors [b C] as they are written, and for int8 the scale of each: its largest value is 127 times that.

    Raises:
        ValueError: A value is not finite, or float16 cannot hold it.
    """
    whole = values.float().cpu().numpy()
    if not np.isfinite(whole).all():
        raise ValueError("the model gave a value that is not finite; use another --dtype (bfloat16, float32)")
    if dtype == "float32":
        return whole, None
    if dtype == "float16":
        if np.abs(whole).max(initial=0) > np.finfo(np.float16).max:
            raise ValueError("a feature is too large for float16 (65504); use --dtype-out float32 or int8")
        return whole.astype(np.float16), None
    scales = np.abs(whole).max(axis=1) / 127
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    return np.rint(whole / scales[:, None]).clip(-127, 127).astype(np.int8), scales


def _vectors(values: Array) -> Any:
    """[b k] as an array of vectors of fixed length."""
    pyarrow = required("pyarrow")
    flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
