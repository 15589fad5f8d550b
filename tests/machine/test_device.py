"""Devices by name, without CUDA by name."""

from __future__ import annotations

import pytest
import torch
from conftest import needs

from cpvit.machine import device
from cpvit.machine.device import choose_device, device_name, synchronize


@pytest.fixture(autouse=True)
def _with_accelerators() -> None:
    needs("torch", "2.6")  # the first with torch.accelerator


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))


def test_auto_is_whatever_accelerator_torch_has(on_a_mac: None) -> None:
    assert choose_device("auto") == torch.device("mps")
    assert choose_device("mps") == torch.device("mps")
    assert choose_device("cpu") == torch.device("cpu")


def test_another_accelerator_than_this_machine_has_is_refused(on_a_mac: None) -> None:
    with pytest.raises(
        ValueError, match=r"'cuda' was asked for and torch sees no CUDA device here; use --device cpu"
    ):
        choose_device("cuda")


def test_without_an_accelerator_mps_is_refused_and_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device 'mps' was asked for and torch sees no MPS device here"):
        choose_device("mps")


def test_an_accelerator_is_waited_for_and_a_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for name in ("cpu", "mps", "cuda:1"):
        synchronize(torch.device(name))
    assert waited == [torch.device("mps"), torch.device("cuda:1")]


def test_times_of_an_accelerator_are_taken_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr("cpvit.machine.timer.synchronize", lambda _: events.append("wait"))
    from cpvit.machine.timer import _timed

    _timed(lambda: events.append("run"), torch.device("mps"), repeats=2)
    assert events == ["wait", "run", "run", "wait"]


def test_the_processor_has_a_name() -> None:
    assert device_name(torch.device("cpu"))
    assert device_name(torch.device("mps")).endswith("(mps)")
    assert device.DTYPES["bfloat16"] is torch.bfloat16
