"""The run fingerprint: what decides the outcome of a run, so that a resumed run is refused if any of it differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpvit.finetune.config import FinetuneConfig
from cpvit.plans.config import PruneConfig
from cpvit.plans.plan import Plan

FREE = ("checkpoint_every",)
"""Fields of the configuration that may differ in a resumed run: they change nothing that is computed."""


def run_fingerprint(
    model: str,
    config: FinetuneConfig,
    pruning: PruneConfig | Plan | None,
    world_size: int,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """The fingerprint as it comes back from JSON; ``more`` is what only the caller knows (weights, images ...)."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    values = {
        "model": model,
        **more,
        "processes": world_size,
        "pruning": "dense" if pruning is None else asdict(pruning),
        **settings,
    }
    fingerprint: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return fingerprint


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words, one per entry."""
    old, new = _flat(then), _flat(now)
    names = [*old, *(name for name in new if name not in old)]
    return [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def refuse_differences(then: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError if the run in the folder was started with another fingerprint."""
    found = differences(then, now)
    if found:
        raise ValueError(
            f"the run in {folder} was started differently and cannot go on like this: {'; '.join(found)}; "
            "give what it was started with, or another folder (--output-dir)"
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {name: value}
    return flat
