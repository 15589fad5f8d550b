"""Files are whole or absent, whoever writes them and whatever goes wrong."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_vit
from torch import nn

from cpvit import Plan, PruneConfig, prune_, save_pruned
from cpvit.commands.cli import run_cli
from cpvit.commands.records import write_record
from cpvit.export.exporting import put
from cpvit.files import write_atomically
from cpvit.pictures.curve import CurvePoint, draw_curve
from cpvit.plans.macs import count_macs


def full(path: Path, text: str | bytes, *args: Any, **kwargs: Any) -> int:
    """Writes half, as a full disk does."""
    data = text if isinstance(text, bytes) else text.encode()
    with path.open("wb") as stream:
        stream.write(data[: len(data) // 2])
    raise OSError(28, "No space left on device")


@pytest.fixture
def plan() -> Plan:
    return prune_(tiny_vit(), PruneConfig(keep_rate=0.5))


@pytest.mark.parametrize("writer", ["plan", "record"])
def test_a_full_disk_leaves_the_old_file(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        plan.save(path) if writer == "plan" else write_record(plan, path)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file.json"]


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "curve.png"
    path.write_text("old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: full(path, "half"))
    with pytest.raises(OSError, match="No space left"):
        draw_curve({"cpvit": [CurvePoint(0.5, 80.0, 0.1)]}, path, title="", dense_top1=81.0)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["curve.png"]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_name_of_a_picture_says_its_format(tmp_path: Path, suffix: str) -> None:
    path = draw_curve(
        {"cpvit": [CurvePoint(0.5, 80.0, 0.1)]}, tmp_path / f"a.{suffix}", title="", dense_top1=81.0
    )
    marks = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert path.read_bytes().startswith(marks[suffix])


def test_saving_a_model_on_a_full_disk_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def fail(*args: object, **kwargs: object) -> None:
        raise SafetensorError("No space left on device")

    model = tiny_vit()
    prune_(model, PruneConfig(keep_rate=0.5))
    monkeypatch.setattr("cpvit.weights.saving.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_pruned(model, tmp_path / "saved")
    assert list((tmp_path / "saved").iterdir()) == []


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "said")
    assert os.read(reader, 10) == b"said"
    os.close(reader)
    assert pipe.is_fifo()


class TestExports:
    def folder(self, tmp_path: Path, *names: str) -> Path:
        made = tmp_path / "made"
        made.mkdir()
        for name in names:
            (made / name).write_text("new")
            (tmp_path / name).write_text("old")
        return made

    def test_an_old_graph_never_meets_new_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = self.folder(tmp_path, "m.xml", "m.bin", "m.xml.json")
        replace = Path.replace

        def killed(file: Path, target: Path) -> Path:
            replace(file, target)
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            put(made, tmp_path / "m.xml")
        assert not (tmp_path / "m.xml").exists()

    def test_a_graph_alone_stays_until_the_new_one_is_there(self, tmp_path: Path) -> None:
        made = self.folder(tmp_path, "m.onnx", "m.onnx.json")
        put(made, tmp_path / "m.onnx")
        assert [(tmp_path / name).read_text() for name in ("m.onnx", "m.onnx.json")] == ["new", "new"]
        assert list(made.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "cpvit: error: out of memory: there is none left"),
        (MemoryError("Unable to allocate 9 GiB"), "cpvit: error: out of memory: Unable to allocate 9 GiB"),
        (
            RuntimeError("could not create a primitive"),
            "cpvit: error: out of memory, most likely: oneDNN could not create a primitive",
        ),
        (ImportError("no room\nto map it"), "cpvit: error: a package cannot be loaded: no room to map it"),
    ],
)
def test_no_memory_is_one_line(error: Exception, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert run_cli(fail, [], prog="cpvit") == 1
    assert capsys.readouterr().err.strip() == says


def test_an_error_that_finds_no_memory_for_its_words_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class WordyError(RuntimeError):
        def __str__(self) -> str:
            raise MemoryError

    def fail() -> None:
        raise WordyError

    assert run_cli(fail, [], prog="cpvit") == 1
    assert capsys.readouterr().err.strip() == "cpvit: error: out of memory: there is none left"


def test_what_failed_is_let_go_before_the_error_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[nn.Module]] = []

    def fail() -> None:
        held = nn.Linear(2, 2)
        made.append(weakref.ref(held))
        raise MemoryError

    said: list[object] = []
    monkeypatch.setattr("cpvit.commands.cli.complain", lambda prog, line: said.append(made[0]()))
    assert run_cli(fail, [], prog="cpvit") == 1
    assert said == [None]


def test_the_weights_keep_their_values_while_macs_are_counted() -> None:
    """Another thread may call the model: layer norm takes weights on the meta device for none, without a word."""
    model = tiny_vit()
    seen: list[torch.device] = []
    model.norm.register_forward_hook(lambda *_: seen.append(model.norm.weight.device))
    assert count_macs(model) > 0
    assert seen == [torch.device("cpu")]


def test_macs_of_a_model_that_cannot_be_copied_are_counted_all_the_same() -> None:
    model = tiny_vit()
    expected = count_macs(model)
    model.lock = threading.Lock()
    assert count_macs(model) == expected
