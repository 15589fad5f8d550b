"""Modules of version 0.1 under their old names."""

from __future__ import annotations

from importlib import import_module

import pytest

import cpvit
from cpvit._moved import MOVED

OLD_NAMES = (
    ("plan", "PruneConfig"),
    ("plan", "Plan"),
    ("benchmark", "benchmark"),
    ("benchmark", "Speedup"),
    ("cascade", "make_steps"),
    ("checkpoints", "load_checkpoint"),
    ("cli", "main"),
    ("graphs", "CapturedModel"),
    ("macs", "count_macs"),
    ("macs", "cost_model"),
    ("metrics", "kl_divergence"),
    ("models", "create_model"),
    ("prune", "prune_"),
    ("saving", "save_pruned"),
    ("schedule", "BudgetError"),
    ("speedup", "tune_speedup"),
    ("tune", "tune"),
    ("verify", "verify"),
)


@pytest.mark.parametrize(("module", "name"), OLD_NAMES)
def test_an_old_name_still_works_and_says_where_it_has_gone(module: str, name: str) -> None:
    old = import_module(f"cpvit.{module}")
    with pytest.warns(
        DeprecationWarning, match=rf"cpvit\.{module}\.{name} has moved to cpvit\.\w+\.\w+; the old name"
    ):
        value = getattr(old, name)
    assert value.__module__ in {f"cpvit.{place}" for place in MOVED[module]}


@pytest.mark.parametrize("module", sorted(MOVED))
def test_every_new_place_exists(module: str) -> None:
    for place in MOVED[module]:
        import_module(f"cpvit.{place}")


def test_what_the_package_exports_is_not_hidden_by_an_old_module() -> None:
    import_module("cpvit.verify")
    import_module("cpvit.calibrate")
    assert callable(cpvit.verify)
    assert callable(cpvit.calibrate)


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(
        AttributeError, match=r"cpvit\.prune has moved to cpvit\.pruning\.prune and .*, which have no x"
    ):
        import_module("cpvit.prune").x  # noqa: B018
