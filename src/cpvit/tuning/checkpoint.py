"""Evaluated schedules on disk, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cpvit.files import write_atomically
from cpvit.plans.json_text import parse_json
from cpvit.tuning.search import Counts


class SearchCheckpoint:
    """Distances under every schedule evaluated so far, on disk, so that an interrupted search can go on."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path = path
        self.key = key
        self.known: dict[str, list[float]] = {}
        if path is not None and path.is_file():
            self.known = self._read(path)

    def _read(self, path: Path) -> dict[str, list[float]]:
        try:
            content = parse_json(path.read_text())
            return dict(content["known"]) if content["key"] == self.key else {}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not the memory of a search; delete it to start anew") from None

    def cached(self, distances: Callable[[Counts], list[float]]) -> Callable[[Counts], list[float]]:
        """The same function of a schedule, but what is known is not computed again."""
        return lambda counts: self.get_or_compute(
            " ".join(str(count) for count in counts), lambda: distances(counts)
        )

    def get_or_compute(self, name: str, compute: Callable[[], list[float]]) -> list[float]:
        """The value under a name; computed, and written down, if it is not known."""
        if name not in self.known:
            self.known[name] = compute()
            self._write()
        return self.known[name]

    def _write(self) -> None:
        if self.path is not None:
            write_atomically(self.path, json.dumps({"key": self.key, "known": self.known}))

    def delete(self) -> None:
        """Remove the file: the search is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
