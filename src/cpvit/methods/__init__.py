"""All methods by name. The paper's method is in :mod:`cpvit.core`, the others are in this package."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cpvit.core import CPViT, Method
from cpvit.methods.cpvit_merge import CPViTMerge
from cpvit.methods.pitome import PiToMe
from cpvit.methods.removal import EViT, Random, TopK
from cpvit.methods.tome import ToMe

_ALL: tuple[Method, ...] = (
    CPViT(),
    CPViTMerge(),
    ToMe(),
    PiToMe(),
    EViT(),
    TopK("evit-no-fuse"),
    TopK("topk"),
    Random(),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})


def method_named(name: str) -> Method:
    """Return the method of this name.

    Raises:
        ValueError: No such method.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
