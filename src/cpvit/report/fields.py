"""Reading values out of JSON: what is missing or of another kind is named with its place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class ReportError(ValueError):
    """A report cannot be made; the message says of which file, why, and what to do."""


@dataclass(frozen=True)
class Fields:
    """An object in a record."""

    values: dict[str, Any]
    place: str
    """The file, and the way to this object in it."""

    def __contains__(self, name: str) -> bool:
        """Whether there is such a field, and not null."""
        return self.values.get(name) is not None

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(name, "a number")
        return float(value)

    def percent(self, name: str) -> float:
        """A number from 0 to 100."""
        value = self.number(name)
        if not 0 <= value <= 100:
            raise self._wrong(name, "a percentage from 0 to 100")
        return value

    def count(self, name: str) -> int:
        """A whole number, at least 0."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(name, "a whole number")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "text")
        return value

    def child(self, name: str) -> Fields:
        """An object."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return Fields(value, self._at(name))

    def children(self, name: str) -> Iterator[Fields]:
        """A list of objects."""
        for number, value in enumerate(self._list(name)):
            if not isinstance(value, dict):
                raise ReportError(f"{self._at(name)}[{number}]: expected an object, got {_short(value)}")
            yield Fields(value, f"{self._at(name)}[{number}]")

    def counts(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        values = self._list(name)
        if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
            raise self._wrong(name, "a list of whole numbers")
        return tuple(values)

    def series(self, name: str) -> tuple[float | None, ...]:
        """A list of numbers, null where one is not finite."""
        values = self._list(name)
        if any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in values):
            raise self._wrong(name, "a list of numbers")
        return tuple(value if value is not None and math.isfinite(value) else None for value in values)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._list(name)
        if any(not isinstance(value, str) for value in values):
            raise self._wrong(name, "a list of texts")
        return tuple(values)

    def _list(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def _at(self, name: str) -> str:
        return f"{self.place}: {name}" if ":" not in self.place else f"{self.place}.{name}"

    def _wrong(self, name: str, expected: str) -> ReportError:
        if name not in self.values:
            return ReportError(f"{self._at(name)} is missing; expected {expected}")
        return ReportError(f"{self._at(name)}: expected {expected}, got {_short(self.values[name])}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
