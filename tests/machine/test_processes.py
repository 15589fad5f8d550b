"""Processes that work together: how they part."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cpvit.machine import processes
from cpvit.machine.processes import LETTING_GO_SECONDS, Processes


@pytest.mark.parametrize(
    ("hangs", "together", "done"),
    [
        (True, 2, [f"asleep {LETTING_GO_SECONDS}", "left"]),
        (False, 2, ["left"]),
        (True, 1, []),
    ],
)
def test_a_group_is_left_once_nothing_holds_the_lock(
    hangs: bool, together: int, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(processes, "LEAVING_MAY_HANG", hangs)
    monkeypatch.setattr("time.sleep", lambda seconds: seen.append(f"asleep {seconds}"))
    accelerator = SimpleNamespace(num_processes=together, end_training=lambda: seen.append("left"))
    Processes(accelerator, torch.device("cpu")).part()
    assert seen == done
