"""Docstrings here say ``Example:``; griffe makes code of what follows ``Examples:``."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once an object is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
