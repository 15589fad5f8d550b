"""The command line of the page, its curve and its HTML, without a browser."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from pathlib import Path

import pytest
import torch

from cpvit import PruneConfig, prune_
from cpvit.app import fragments
from cpvit.app.curve import chart, digits_panel, read_panel
from cpvit.app.handlers import Handlers
from cpvit.app.serve import ServeOptions, free_port
from cpvit.app.subject import demo_subject
from cpvit.app.turns import Turns
from cpvit.commands.cli import main
from cpvit.data import find_samples, make_loader
from cpvit.demo import load_digits_model
from cpvit.measure.sweep import SweepOptions, sweep
from cpvit.plans.escalation import Escalation


def test_gradio_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    assert main(["app"]) == 1
    assert capsys.readouterr().err.strip() == (
        "cpvit: error: gradio is needed for cpvit app and is not installed: pip install 'cpvit[app]'"
    )


def refused(*options: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``cpvit app`` says before it serves anything."""
    monkeypatch.setattr("cpvit.commands.app.check_gradio", lambda: None)
    monkeypatch.setattr("cpvit.commands.app.serve", lambda *_: pytest.fail("it serves"))
    assert main(["app", "--port", "0", *options]) == 1
    return capsys.readouterr().err


def test_what_does_not_go_together_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prune_(load_digits_model(), PruneConfig(macs=0.6))
    Escalation(plan, None, 0.5).save(tmp_path / "pair.json")
    (tmp_path / "bench.json").write_text(json.dumps({"dense": 1, "rows": [], "rounds": 7}))
    (tmp_path / "no.json").write_text("[]")
    for options, message in (
        (("--plan", f"{tmp_path}/pair.json"), "holds two plans to escalate between, and the page shows one"),
        (("--pretrained",), "give --model NAME as well"),
        (("--model", "deit_tiny_patch16_224"), "random weights have no accuracy to measure"),
        (("--sweep", f"{tmp_path}/bench.json"), "is the record of another command (comparison)"),
        (("--sweep", f"{tmp_path}/no.json"), "holds a list, not a record"),
        (("--sweep", f"{tmp_path}/none.json"), "cannot be read"),
        (("--exported", f"{tmp_path}/none.onnx"), "is not a file"),
    ):
        assert message in refused(*options, capsys=capsys, monkeypatch=monkeypatch)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot serve on 127\.0\.0\.1:{port} .*give another --port"):
            free_port(ServeOptions(port=port))
    assert free_port(ServeOptions(port=0)) > 0
    with pytest.raises(ValueError, match=r"cannot serve on 192\.0\.2\.1:0"):
        free_port(ServeOptions(host="192.0.2.1", port=0))


def test_the_digits_curve_is_that_of_sweep(tmp_path: Path) -> None:
    subject = demo_subject()
    assert subject.dense is not None
    options = SweepOptions(methods=("tome",), macs=(0.5,))
    told: list[tuple[float, str]] = []
    panel = digits_panel(
        subject.dense,
        subject.preprocessing,
        Turns(),
        lambda share, title: told.append((share, title)),
        images=20,
        options=options,
    )
    assert told == [(0.0, "dense"), (0.5, "tome 0.5")]
    assert [point.title for point in panel.points] == ["dense", "tome at 50.0%"]
    for number, example in enumerate(Handlers(subject).examples[:4]):
        folder = tmp_path / example.title.split()[-1]
        folder.mkdir(exist_ok=True)
        example.picture.save(folder / f"{number}.png")
    batches = make_loader(
        find_samples(str(tmp_path)),
        subject.preprocessing,
        labels={str(digit): digit for digit in range(10)},
        batch_size=4,
    )
    found = sweep(load_digits_model(), batches, options)
    assert panel.points[1].macs == pytest.approx(found.points[0].macs_ratio, abs=1e-6)
    assert panel.images == 20
    json.dumps(chart(panel), allow_nan=False)


def test_every_text_is_escaped() -> None:
    hostile = "<script>alert(1)</script>\"'"
    for made in (
        fragments.status(hostile),
        fragments.alert(hostile),
        fragments.heading(hostile, False),
        fragments.table(hostile, [hostile], [[hostile, hostile]]),
    ):
        assert "<script" not in made
        assert "&lt;script&gt;" in made


def test_a_class_name_cannot_be_markup() -> None:
    subject = demo_subject()
    names = ("<b>zero</b>", *(f"<i>{digit}</i>" for digit in range(1, 10)))
    handlers = Handlers(type(subject)(subject.dense, subject.preprocessing, names))
    found = handlers.answer(handlers.load_example(0).image, None, "cpvit", 60, 3, "both")
    assert "<i>" not in found.answers
    assert "&lt;i&gt;" in found.answers


def test_a_budget_that_cannot_be_met_clears_the_page() -> None:
    handlers = Handlers(demo_subject())
    image = handlers.load_example(0).image
    found = handlers.answer(image, None, "cpvit", 1, 3, "both")
    assert found.look is None
    assert "cannot be met by pruning patches" in found.answers
    assert 'role="alert"' in found.answers
    assert (found.figures, found.downloads, found.times) == ("", "", "")
    assert handlers.answer(None, None, "cpvit", 60, 3, "both") == (None, "", "", "", "")
    assert "cannot be met" in handlers.compare(image, (), ["cpvit"], 1, 3, "both").html


def test_what_people_look_at_is_not_kept() -> None:
    """The handlers, which everybody shares, hold no image afterwards."""
    handlers = Handlers(demo_subject())
    image = torch.rand(1, 3, 96, 96)
    found = handlers.answer(image, None, "cpvit", 60, 3, "both")
    handlers.measure([found.look])
    seen: set[int] = set()

    def holds(value: object) -> bool:
        if id(value) in seen or isinstance(value, (str, bytes, int, float)):
            return False
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            return value.shape == image.shape and torch.equal(value, image)
        if isinstance(value, dict):
            return any(map(holds, value.values()))
        if isinstance(value, (list, tuple, set)):
            return any(map(holds, value))
        return any(map(holds, getattr(value, "__dict__", {}).values()))

    assert not holds(handlers)


def test_the_environment_is_put_back(tmp_path: Path) -> None:
    from cpvit.app.serve import _environment

    before = dict(os.environ)
    with _environment(str(tmp_path)):
        assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert dict(os.environ) == before


def test_a_record_without_points_is_named(tmp_path: Path) -> None:
    values = {"model": "m", "images": 0, "dense_top1": 1.0, "dense_top5": 1.0, "dense_macs": 1, "points": []}
    (tmp_path / "empty.json").write_text(json.dumps(values | {"environment": {}}))
    assert [point.title for point in read_panel(tmp_path / "empty.json").points] == ["dense"]
