"""Images of a batch, decoded by several threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pictures import SMALL, WORKERS, images_of, write_classes

from cpvit.data import find_samples, make_loader
from cpvit.data.threads import MOST, decoding_threads, side_by_side


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_as_many_threads_as_torch_has_work_at_once_and_the_order_stays() -> None:
    both = threading.Barrier(2, timeout=60)

    def make(number: int) -> tuple[int, bool]:
        both.wait()
        return number, threading.current_thread() is threading.main_thread()

    assert side_by_side(make, range(6)) == [(number, False) for number in range(6)]


@pytest.mark.usefixtures("two_threads")
def test_the_first_error_is_raised() -> None:
    def make(number: int) -> int:
        if number in (3, 5):
            raise ValueError(f"number {number}")
        return number

    with pytest.raises(ValueError, match="number 3"):
        side_by_side(make, range(8))


def test_one_thread_is_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert side_by_side(lambda _: threading.current_thread(), "ab") == [threading.current_thread()] * 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 96)
    assert decoding_threads() == MOST


@WORKERS
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_who_decodes(
    tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_samples(write_classes(tmp_path / "root"))
    found = images_of(make_loader(source, SMALL, labels=None, batch_size=4, num_workers=num_workers))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert torch.equal(found, images_of(make_loader(source, SMALL, labels=None, batch_size=4)))
