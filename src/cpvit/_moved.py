"""Modules of version 0.1 under their old names, for one version more; using one warns with its new place."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

MOVED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "benchmark": ("measure.benchmark", "measure.timings", "measure.memory"),
        "calibrate": ("pruning.calibrate", "plans.calibration"),
        "cascade": ("pruning.cascade", "pruning.install", "plans.steps"),
        "checkpoints": ("weights.loading", "weights.reading"),
        "cli": ("commands.cli",),
        "environment": ("machine.environment", "machine.device"),
        "evaluate": ("measure.evaluate",),
        "finetune.judge": ("finetune.evaluation", "finetune.features"),
        "finetune.log": ("finetune.tensorboard",),
        "finetune.observe": ("finetune.callbacks",),
        "finetune.optimise": ("finetune.optimizer", "finetune.freeze", "finetune.features"),
        "finetune.tighten": ("finetune.gradual",),
        "graphs": ("kernels.cuda_graphs",),
        "heads": ("pruning.heads", "plans.heads"),
        "macs": ("plans.macs", "plans.costs"),
        "metrics": ("measure.metrics",),
        "models": ("weights.create",),
        "plan": ("plans.config", "plans.plan"),
        "planning": ("plans.resolve", "machine.align"),
        "prune": ("pruning.prune", "pruning.record", "plans.check"),
        "recipes": ("weights.spec",),
        "saving": ("weights.saving",),
        "schedule": ("plans.schedules", "plans.budget"),
        "search": ("tuning.search",),
        "seed": ("commands.original",),
        "speedup": ("tuning.speedup",),
        "support": ("measure.support", "measure.support_cases", "measure.support_models"),
        "sweep": ("measure.sweep", "pictures.sweeps"),
        "timing": ("machine.timer", "machine.timing_cache", "machine.block_profiler", "machine.time_model"),
        "tune": ("tuning.tune", "tuning.target"),
        "verify": ("pruning.verify",),
        "visualize": ("pictures.survivors", "pictures.patches"),
    }
)
"""Old module to the new ones that hold what was in it."""


class _OldModule(ModuleType):
    """Stands where a module was; whatever is asked of it comes from where its content is now."""

    def __init__(self, name: str, places: tuple[str, ...]) -> None:
        super().__init__(name, "Moved.")
        self._places = tuple(f"cpvit.{place}" for place in places)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # questions of Python's own, not of a user
            raise AttributeError(attribute)
        for place in self._places:
            module = import_module(place)
            if attribute in vars(module):
                warnings.warn(
                    f"{self.__name__}.{attribute} has moved to {place}; the old name goes with the next version",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return vars(module)[attribute]
        raise AttributeError(
            f"{self.__name__} has moved to {' and '.join(self._places)}, which have no {attribute}"
        )


def install(package: ModuleType) -> None:
    """Let the old modules of a package be imported; what its ``__init__`` exports under the same name stays."""
    for name, places in MOVED.items():
        old = _OldModule(f"{package.__name__}.{name}", places)
        sys.modules[old.__name__] = old
        vars(package).setdefault(name, old)
