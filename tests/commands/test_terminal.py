"""What reaches the terminal: results, remarks, bars, errors; quiet, verbose, colours."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from cpvit.commands import terminal
from cpvit.commands.cli import main, run_cli
from cpvit.commands.terminal import TerminalOptions, complain, progress, say, show, stage_bar, typed_command

ESCAPE = "\x1b["


def work(fail: bool = False) -> None:
    """Say, show, and go through a few things.

    Args:
        fail: Raise an error at the end.
    """
    say("a remark")
    assert list(progress(iter(range(3)), "things", 3)) == [0, 1, 2]
    show("dense  1\nfaster 2 [not markup]")
    if fail:
        raise ValueError("it did not work")


def call(*arguments: str) -> int:
    return run_cli({"work": work, "other": work}, ["work", *arguments], prog="tool")


def test_results_are_on_stdout_and_remarks_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    captured = capsys.readouterr()
    assert captured.out == "dense  1\nfaster 2 [not markup]\n"
    assert captured.err == "a remark\n", "no bar where there is no terminal"


def test_a_bar_on_a_terminal_has_its_times(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert call() == 0
    err = capsys.readouterr().err
    assert "things" in err
    assert "0:00" in err
    assert call("--quiet") == 0
    assert capsys.readouterr().err == ""


def test_quiet_leaves_results_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--quiet", "--fail") == 1
    captured = capsys.readouterr()
    assert captured.out == "dense  1\nfaster 2 [not markup]\n"
    assert captured.err == "tool: error: it did not work\n"


def test_verbose_tells_times_and_where_an_error_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--verbose", "--fail") == 1
    err = capsys.readouterr().err
    assert "things: 0.0 s" in err
    assert "Traceback" in err
    assert "test_terminal.py" in err
    assert err.endswith("tool: error: it did not work\n")


def test_quiet_and_verbose_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--quiet", "--verbose") == 1
    assert "give --quiet or --verbose, not both" in capsys.readouterr().err


def test_options_end_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    call("--quiet")
    say("heard again")
    assert "heard again" in capsys.readouterr().err
    assert typed_command() is None


def test_stages_are_announced_one_by_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.terminal(TerminalOptions(verbose=True)), stage_bar(2) as begin:
        begin("first")
        begin("second")
    assert "second" in capsys.readouterr().err


def test_the_typed_command_is_quoted_for_a_shell() -> None:
    with terminal.command_line(("cpvit", "eval", "--data", "my images")):
        assert typed_command() == "cpvit eval --data 'my images'"


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_for_a_terminal_that_wants_them(variables: dict[str, str], coloured: bool) -> None:
    code = "from cpvit.commands.terminal import complain, show; show('faster'); complain('tool', 'wrong')"
    environment = {**os.environ, "TERM": "xterm-256color", **variables}
    if not variables:
        environment.pop("NO_COLOR", None)
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment, check=True)
    os.close(theirs)
    seen = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "faster" in seen
    assert ("\x1b[32m" in seen) == coloured
    piped = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert ESCAPE not in piped.stdout + piped.stderr


def test_completion_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tyro-print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "benchmark" in script
    assert "--macs" in script


def test_a_folder_that_is_missing_is_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nowhere" / "a.json"
    assert main(["benchmark", "--model", "test_vit", "--json", str(nowhere)]) == 1
    assert f"--json {nowhere}: there is no folder {nowhere.parent}; make it first" in capsys.readouterr().err


def test_a_record_has_the_command_and_a_report_is_made_of_it(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    record, page = tmp_path / "record.json", tmp_path / "page.html"
    asked = [
        "benchmark",
        "--model",
        "test_vit",
        "--batch-size",
        "1",
        "--seconds",
        "0.1",
        "--device",
        "cpu",
        "--quiet",
    ]
    assert main([*asked, "--json", str(record), "--report", str(page)]) == 0
    made = json.loads(record.read_text())["made_by"]
    assert made["record"] == "BenchmarkResult"
    assert made["command"].startswith("cpvit benchmark --model test_vit --batch-size 1")
    text = io.StringIO(page.read_text()).read()
    assert "cpvit benchmark --model test_vit --batch-size 1" in text
    assert '<section id="speed">' in text


def test_an_error_is_said_even_where_no_file_can_be_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich imports parts of itself late."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("rich.console.Console.print", fail)
    complain("cpvit", "no more files [here]")
    assert capsys.readouterr().err == "cpvit: error: no more files [here]\n"
