"""Killed at any moment, with a full disk, or by two processes: the files are those of an undisturbed run."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bulk_runs import COUNT, asked, contents, parts, pq, ran, whole, write_folder, write_shards, write_weights

from cpvit.commands.cli import main

MERGED = ["--method", "cpvit-merge", "--macs", "0.7"]
KILLS = int(os.environ.get("CPVIT_KILLS", "4"))
"""For each kind of run; 25 make the 50 of a long test."""
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "folder", COUNT)


@pytest.mark.parametrize("verb", ["predict", "embed"])
def test_killed_at_random_moments(weights: Path, tmp_path: Path, verb: str) -> None:
    """With a bad image in the middle, and small parts, so that most kills meet one that is being written."""
    count = 120
    more = ["--rows-per-part", "5", "--batch-size", "2", *MERGED]
    if verb == "embed":
        data: Path | str = write_shards(tmp_path / "shards", count, 3)
        more += ["--features", "tokens", "--dtype-out", "int8", "--workers", "1"]
    else:
        data = write_folder(tmp_path / "images", count, bad=True)
    undisturbed = tmp_path / "undisturbed"
    ran(verb, weights, data, undisturbed, *more)
    line = [*asked(verb, weights, data, tmp_path / "killed", *more), "--resume"]
    command = [sys.executable, str(HERE / "killed_runs.py"), str(KILLS), "7", "2.0", *line]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, env=_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    killed, *left = map(int, done.stdout.split())
    assert killed == KILLS
    assert max(left) > 0, "some were killed between parts"
    found = contents(tmp_path / "killed")
    assert len(found) == 24
    assert found == contents(undisturbed)
    assert whole(tmp_path / "killed")["row"].to_pylist() == list(range(count)), "every image once, in order"


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def test_a_full_disk(weights: Path, folder: Path, tmp_path: Path) -> None:
    """The limit on file sizes makes the third part, the largest, fail as a full disk does: within a write."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    more = ["--features", "tokens", "--dense", "--rows-per-part", "12"]
    ran("embed", weights, folder, undisturbed, *more)
    largest = max(path.stat().st_size for path in parts(undisturbed))
    line = asked("embed", weights, folder, out, *more)
    code = f"import sys; from cpvit.commands.cli import main; sys.exit(main({line!r}))"
    limit = largest - 1000
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=_environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(parts(out)) < len(parts(undisturbed))
    assert not list(out.glob(".part*")), "nothing half-written is left"
    assert main([*line, "--resume"]) == 0
    assert contents(out) == contents(undisturbed)


def test_a_run_that_is_done_has_nothing_to_do(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ran("predict", weights, folder, out, *MERGED)
    before = {path: path.stat().st_mtime_ns for path in parts(out)}
    assert main(asked("predict", weights, folder, out, *MERGED)) == 1
    assert "holds a run already; add --resume" in capsys.readouterr().err
    assert main([*asked("predict", weights, folder, out, *MERGED), "--resume"]) == 0
    assert "nothing was missing" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in parts(out)} == before


def test_damaged_parts_and_leftovers_are_made_again(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ran("predict", weights, folder, out, *MERGED)
    expected = contents(out)
    first, second, third, _ = parts(out)
    first.write_bytes(first.read_bytes()[:-100])
    pq.write_table(pq.read_table(second)[:3], second)
    third.unlink()
    (out / ".part-00002.parquet.0123").write_bytes(b"half")
    assert main([*asked("predict", weights, folder, out, *MERGED), "--resume"]) == 0
    said = capsys.readouterr().err
    assert f"{first} was damaged and is made again" in said
    assert f"{second} was damaged and is made again" in said
    assert contents(out) == expected


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (["--dense"], "calibration_images was 0 and is None"),
        (["--method", "cpvit-merge", "--macs", "0.8"], "dial was 'macs=0.7' and is 'macs=0.8'"),
        ([*MERGED, "--top-k", "2"], "columns was 'TopClasses(k=5)' and is 'TopClasses(k=2)'"),
        ([*MERGED, "--rows-per-part", "9"], "rows_per_part was 8 and is 9"),
        ([*MERGED, "--batch-size", "3"], "batch_size was 4 and is 3"),
        ([*MERGED, "--crop-pct", "0.5"], "crop_pct was"),
    ],
)
def test_another_run_is_refused(
    weights: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    other: list[str],
    says: str,
) -> None:
    ran("predict", weights, folder, tmp_path / "out", *MERGED)
    assert main([*asked("predict", weights, folder, tmp_path / "out", *other), "--resume"]) == 1
    said = capsys.readouterr().err
    assert "was begun differently and cannot go on like this" in said
    assert says in said


def test_another_source_or_other_weights_are_refused(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ran("predict", weights, folder, out, *MERGED)
    fewer = write_folder(tmp_path / "fewer", COUNT - 1)
    assert main([*asked("predict", weights, fewer, out, *MERGED), "--resume"]) == 1
    assert "images was 30 and is 29" in capsys.readouterr().err
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["head.bias"] = tensors["head.bias"] + 1
    save_file(tensors, tmp_path / "other.safetensors")
    assert main([*asked("predict", tmp_path / "other.safetensors", folder, out, *MERGED), "--resume"]) == 1
    assert "weights_sha256 was" in capsys.readouterr().err
    (out / "_run.json").write_text("{")
    assert main([*asked("predict", weights, folder, out, *MERGED), "--resume"]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_two_processes_write_what_one_does(weights: Path, tmp_path: Path) -> None:
    bad = write_folder(tmp_path / "images", COUNT, bad=True)
    more = ["--features", "mean", *MERGED, "--rows-per-part", "4", "--json"]
    ran("embed", weights, bad, tmp_path / "one", *more, str(tmp_path / "one.json"))
    line = asked("embed", weights, bad, tmp_path / "two", *more, str(tmp_path / "two.json"))
    # Two parts are there already, as after a stop: the others are shared out.
    ran("embed", weights, bad, tmp_path / "two", *more, str(tmp_path / "two.json"))
    for path in parts(tmp_path / "two")[2:]:
        path.unlink()
    printed = two_processes([*line, "--resume"], tmp_path)
    assert printed.count("22 done in") == 1, "only the first process prints"
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    found: dict[str, Any] = json.loads((tmp_path / "two.json").read_text())
    assert (found["processes"], found["done"], found["parts"], found["bad_images"]) == (2, 22, 6, 1)


def two_processes(arguments: list[str], folder: Path) -> str:
    """What ``torchrun`` prints for a command line of cpvit."""
    script = folder / "cpvit_script.py"
    script.write_text("from cpvit.commands.cli import entry_point; entry_point()")
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    done = subprocess.run([*run, *arguments], capture_output=True, text=True, timeout=300, env=_environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_an_error_that_only_pyarrow_knows_is_one_line(
    weights: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pyarrow

    def fail(*args: object, **kwargs: object) -> None:
        raise pyarrow.ArrowException("Failed to launch worker thread")

    monkeypatch.setattr("cpvit.commands.bulk.list_source", fail)
    assert main([*asked("predict", weights, folder, tmp_path / "out"), "--quiet"]) == 1
    assert capsys.readouterr().err.strip() == "cpvit: error: pyarrow: Failed to launch worker thread"


def test_a_machine_without_open_files_is_no_bad_image(
    weights: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would become a row without values, in a run that says it is done."""
    out, read = tmp_path / "out", Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "0012.png":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return read(path)

    line = asked("predict", weights, folder, out, *MERGED)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert main(line) == 1
    assert "0012.png: Too many open files" in capsys.readouterr().err
    assert main([*line, "--resume"]) == 0
    assert whole(out)["error"].null_count == COUNT
