"""JSON from files that may be damaged or hostile, and into files that are whole or absent."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any


def parse_json(text: str) -> Any:
    """What JSON text says.

    Raises:
        ValueError: Not JSON, or nested deeper than any file of ours (a RecursionError inside).
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply for a file of ours") from None


def write_text(path: Path, text: str) -> None:
    """Write beside the file and then take its place, as ``cpvit.machine.files`` does, which stands above plans.

    Raises:
        OSError: It cannot be written; what was there before stays.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_text(text)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
