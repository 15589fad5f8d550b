"""The methods by name. The paper's own is in :mod:`cpvit.core`; the others are here, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cpvit.core import CPViT, Method

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in (CPViT(),)})


def method_named(name: str) -> Method:
    """Look a method up.

    Raises:
        ValueError: No such method.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
