"""Writing tables between the markers of a page."""

from __future__ import annotations

import re
from collections.abc import Mapping

MARKED = re.compile(r"<!-- evidence: (?P<name>[\w-]+) -->\n.*?<!-- /evidence -->", re.DOTALL)
NUMBERS = re.compile(r"\d")


def names(page: str) -> list[str]:
    """Tables that a page has a place for."""
    return [found["name"] for found in MARKED.finditer(page)]


def written(page: str, texts: Mapping[str, str | None]) -> str:
    """The page with each of its places filled; a place whose text is None keeps what it holds.

    Raises:
        KeyError: A place names a table that is not in the catalog.
    """

    def filled(found: re.Match[str]) -> str:
        text = texts[found["name"]]
        return found[0] if text is None else f"{_opening(found['name'])}\n{text}\n{CLOSING}"

    return MARKED.sub(filled, page)


def typed_tables(page: str) -> list[str]:
    """First lines of the tables with a number in them that stand outside of all places."""
    outside = MARKED.sub("", page)
    blocks = re.findall(r"(?:^\|.*\n)+", outside, re.MULTILINE)
    return [block.split("\n")[0] for block in blocks if NUMBERS.search(_without_links(block))]


def _without_links(text: str) -> str:
    return re.sub(r"\]\([^)]*\)|`[^`]*`", "", text)


def _opening(name: str) -> str:
    return f"<!-- evidence: {name} -->"


CLOSING = "<!-- /evidence -->"
