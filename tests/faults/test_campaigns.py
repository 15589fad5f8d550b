"""A short run of the campaigns that start processes; each in a process that has no other threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.faults.wholeness import broken, differing, products

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="processes are forked and limited as on Linux"
)


def ran(*arguments: str) -> str:
    """What Python prints."""
    places = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "CPVIT_BURST": "0.5"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def outcomes(printed: str) -> dict[str, str]:
    """What came of every campaign."""
    return dict(re.findall(r"^(\w+: [^:]+): \d+ cases, 0 failed; (.*)$", printed, re.M))


@pytest.fixture(scope="module")
def printed() -> str:
    pytest.importorskip("pyarrow")
    few = ["--cases", "1", "--seed", "4", "--minutes", "100"]
    names = ["kills: predict", "kills: plan", "resources", "concurrency"]
    return ran("-m", "tests.faults", *few, "--only", *names)


@pytest.mark.parametrize("name", ["kills: predict", "kills: plan"])
def test_killed_commands_are_resumed(printed: str, name: str) -> None:
    assert "resumed after a kill" in outcomes(printed)[name]


@pytest.mark.parametrize(
    "name", ["full disk", "read-only disk", "read-only folder", "short files", "few handles"]
)
def test_what_is_missing_is_said_in_a_line(printed: str, name: str) -> None:
    found = outcomes(printed)[f"resources: {name}"]
    if "not tried" in found:
        pytest.skip(found)
    assert "refused in one line, then done" in found or "done all the same" in found


@pytest.mark.parametrize("name", ["permission lost", "little memory", "clock set back"])
def test_nothing_is_left_half_done(printed: str, name: str) -> None:
    found = outcomes(printed)[f"resources: {name}"]
    if "not tried" in found:
        pytest.skip(found)
    assert "done" in found


@pytest.mark.parametrize(
    "name",
    ["threads", "processes", "pruning while others call", "swapping while others call", "leaving a group"],
)
def test_many_callers_get_whole_answers(printed: str, name: str) -> None:
    assert f"concurrency: {name}" in outcomes(printed)


IN_PLACE = """
import sys, tempfile, torch
from pathlib import Path
import cpvit.commands.records as records
from tests.faults.kills import Moment, killed
from tests.faults.subjects import inputs, subjects
from tests.faults.wholeness import broken

torch.set_num_threads(1)
subject = subjects()["eval"]
if sys.argv[1] == "in place":
    records.write_atomically = lambda path, content: path.write_text(content)
with tempfile.TemporaryDirectory(dir=inputs().folder) as folder:
    out = Path(folder) / "out"
    out.mkdir()
    assert killed(subject, out, Path(folder) / "said", Moment("a write", 0, 0, False, 700))
    print("half" if broken(out) else "none")
"""


@pytest.mark.parametrize(("how", "left"), [("in place", "half"), ("beside it", "none")])
def test_a_command_that_writes_in_place_is_found_out(how: str, left: str) -> None:
    assert ran("-c", IN_PLACE, how).strip() == left


WRONG = """
import torch
from tests.faults import concurrency
from tests.faults.campaign import run

torch.set_num_threads(1)
answers = iter(range(10**9))
right = concurrency.answer
concurrency.answer = lambda network, images: right(network, images) + (next(answers) % 50 == 40)
print(len(run("threads", concurrency.threads, range(1)).failures))
"""


def test_an_answer_of_another_thread_is_found_out() -> None:
    assert ran("-c", WRONG).strip() == "1"


@pytest.mark.parametrize("name", ["a.json", "a.safetensors", "a.png", "a.html", "a.parquet"])
def test_half_a_file_is_known(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text('{"a": [1, 2, 3]}')
    elif path.suffix == ".safetensors":
        save_file({"a": torch.ones(100)}, path)
    elif path.suffix == ".png":
        Image.effect_noise((40, 40), 50).save(path)
    elif path.suffix == ".html":
        path.write_text("<html>" + "words " * 100 + "</html>\n")
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({"a": list(range(100))}), path)
    (tmp_path / ".draft.json").write_text("{")
    assert broken(tmp_path) == []
    before = products(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert len(broken(tmp_path)) == 1
    path.unlink()
    assert differing(products(tmp_path), before) == [name]
