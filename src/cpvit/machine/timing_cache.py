"""Block times on disk: readable JSON in the user's cache folder. What was measured once is not measured again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cpvit.files import write_atomically
from cpvit.machine.timer import Run, Timer
from cpvit.plans.json_text import parse_json


class TimesError(ValueError):
    """The file that block times are kept in cannot be used."""


def cache_folder() -> Path:
    """Where block times are kept: ``$XDG_CACHE_HOME/cpvit``, by default ``~/.cache/cpvit``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "cpvit"


class TimingCache:
    """Times by name, on disk. Only what is not in it is measured.

    Every measurement times a reference along, and is scaled by what the reference took the first time: so the times
    of two days can be compared although the machine was not equally fast on both.

    Raises:
        TimesError: The file holds something else, or cannot be written.
    """

    def __init__(self, path: Path, subject: str, device: torch.device, timer: Timer) -> None:
        self.path = path
        self.subject = subject
        self.device = device
        self.timer = timer
        self.known: dict[str, float] = self._read() if path.is_file() else {}

    def _read(self) -> dict[str, float]:
        try:
            content = parse_json(self.path.read_text())
            return {str(name): float(value) for name, value in content["seconds"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TimesError(
                f"{self.path} does not hold block times; delete it to have them measured again"
            ) from None

    def missing(self, names: Sequence[str]) -> list[str]:
        """What would have to be measured."""
        return [name for name in names if name not in self.known]

    def measure(self, runs: Mapping[str, Run], reference: Run) -> None:
        """Time the runs in turn and write the times down."""
        first, *seconds = self.timer([reference, *runs.values()], self.device)
        scale = self.known.setdefault("reference", first) / first
        self.known.update({name: value * scale for name, value in zip(runs, seconds, strict=True)})
        content = {"of": self.subject, "seconds": self.known}
        try:
            write_atomically(self.path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise TimesError(
                f"cannot keep block times in {self.path} ({error.strerror}); set XDG_CACHE_HOME to a folder that "
                "can be written, or give --align none"
            ) from None
