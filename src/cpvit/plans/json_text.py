"""JSON from files that may be damaged or hostile."""

from __future__ import annotations

import json
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
