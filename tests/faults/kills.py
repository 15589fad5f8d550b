"""SIGKILL in the middle of a command: nothing half-written passes for whole, and the next run makes the same files."""

from __future__ import annotations

import importlib.util
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.faults.children import end, family, finished, kill, kill_with_all, start, wait
from tests.faults.subjects import Subject, inputs, line_of, subjects, undisturbed
from tests.faults.wholeness import broken, differing, files, hidden, products

MOMENTS = ("a random time", "a random time", "a rename", "a rename", "a sync", "a write")
TRIES = 8
"""To kill a run before it is over."""
PATIENCE = 60.0
"""Seconds in which the other of two processes must end once one is dead."""


@dataclass(frozen=True)
class Moment:
    """When a run is killed."""

    kind: str
    seconds: float
    """After its start, for a random time."""
    count: int
    """At which rename or sync."""
    after: bool
    """After the rename rather than before."""
    bytes: int
    """Largest file that can be written before the kill, for one within a write."""

    @classmethod
    def drawn(cls, subject: Subject, choose: random.Random) -> Moment:
        """Any moment of the undisturbed run."""
        whole = undisturbed(subject.name)
        return cls(
            kind=choose.choice(MOMENTS),
            seconds=choose.uniform(0, whole.seconds),
            count=choose.randint(1, 60 if subject.name.startswith("finetune") else 6),
            after=choose.random() < 0.5,
            bytes=int(whole.largest ** choose.uniform(0.2, 1)),
        )

    def prepare(self) -> None:
        """In the child: be killed at that moment."""
        if self.kind == "a rename":
            _patch(Path, "replace", self.count, after=self.after)
        elif self.kind == "a sync":
            _patch(os, "fsync", self.count, after=False)
        elif self.kind == "a write":
            # A write beyond the limit is cut at the limit, and the next one kills: half a file is left.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, self.bytes))


def _patch(owner: Any, name: str, count: int, *, after: bool) -> None:
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def killing(*args: Any) -> Any:
        last = next(calls) == count
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = original(*args)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, killing)


def case(name: str, seed: int) -> str:
    """Kill a run once, look at what it left, run it again, and compare.

    Raises:
        AssertionError: Something half-written stood under a final name, or the second run failed or differs.
    """
    subject, choose = subjects()[name], random.Random(f"{name} {seed}")
    undisturbed(name)
    for _ in range(TRIES):
        with tempfile.TemporaryDirectory(dir=inputs().folder) as folder:
            out, said = Path(folder) / "out", Path(folder) / "said"
            out.mkdir()
            moment = Moment.drawn(subject, choose)
            if killed(subject, out, said, moment):
                check(subject, out, said)
                return f"resumed after a kill at {moment.kind}"
    raise AssertionError(f"over {TRIES} times before it could be killed")


def killed(subject: Subject, out: Path, said: Path, moment: Moment) -> bool:
    """Whether the run was killed before its end."""

    def run() -> int:
        moment.prepare()
        return subject.run(out)

    child = start(run, said)
    status = wait(child, moment.seconds if moment.kind == "a random time" else 300.0)
    if status is None:
        assert moment.kind == "a random time", "hangs"
        status = end(child)
    elif subject.processes > 1:
        end_orphans(child.pid)
    assert status in (0, -signal.SIGKILL, -signal.SIGXFSZ), f"ended by itself: {said.read_text()[-500:]}"
    return status != 0


def end_orphans(session: int) -> None:
    """What was started with a process that is dead, as a launcher does."""
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return


def check(subject: Subject, out: Path, said: Path) -> None:
    """What a kill left is whole or absent, and the second run makes what an undisturbed one does."""
    halves = broken(out)
    assert not halves, f"half-written after the kill: {halves}"
    status, _ = finished(lambda: subject.run(out), said)
    assert status == 0, f"the second run failed: {said.read_text()[-500:]}"
    different = differing(products(out), undisturbed(subject.name).products)
    assert not different, f"differs from the undisturbed run: {different}"
    if subject.again:
        left = [str(path.relative_to(out)) for path in leftovers(out)]
        assert len(left) <= allowed_leftovers(subject), f"left behind: {left}"


def leftovers(out: Path) -> Iterator[Path]:
    """Drafts of a killed run."""
    return (path for path in out.rglob("*") if path.is_file() and hidden(path.relative_to(out)))


def allowed_leftovers(subject: Subject) -> int:
    """A killed search leaves the draft that it was writing; the others tidy up."""
    return 1 if subject.name == "plan" else 0


def one_of_two(seed: int) -> str:
    """The second of two processes dies: the first ends by itself, with an error; then both go on.

    Before they have met torch waits for the second, up to half an hour. It is the launcher that ends such a run, and
    there is none here.

    Raises:
        AssertionError: It hangs, says nothing, or the resumed run differs.
    """
    subject, choose = subjects()["finetune, two processes"], random.Random(seed)
    seconds = undisturbed(subject.name).seconds
    for _ in range(TRIES):
        with tempfile.TemporaryDirectory(dir=inputs().folder) as folder:
            out, said = Path(folder) / "out", Path(folder) / "said"
            out.mkdir()
            child = start(lambda out=out: subject.run(out), said)  # type: ignore[misc]
            status = wait(child, choose.uniform(0.05, seconds))
            if status is None and not met(child.pid):
                end(child)
                continue
            kill(family(child.pid)[1:])
            if status is None:
                status = wait(child, PATIENCE)
            if status == 0:
                continue
            if status is None:
                end(child)
                raise AssertionError(f"the other process still waits after {PATIENCE:.0f} s")
            check(subject, out, said)
            return "resumed after the death of one of two"
    raise AssertionError(f"over {TRIES} times before one could be killed")


def met(process: int) -> bool:
    """Whether a process that was started with this one is connected to it."""
    return any(
        connection.status == psutil.CONN_ESTABLISHED
        for other in family(process)[1:]
        for connection in other.net_connections()
    )


# --- real command lines -------------------------------------------------------------------------------------------

LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}  # fmt: skip
SCRIPT = "from cpvit.commands.cli import entry_point\nentry_point()\n"


def real(seed: int) -> str:
    """A command line as a person types it, killed with all its processes, and typed again.

    Raises:
        AssertionError: As for :func:`case`.
    """
    launcher = sorted(LAUNCHERS)[seed % len(LAUNCHERS)]
    name = "finetune" if launcher == "python" else "finetune, two processes"
    choose = random.Random(seed)
    undisturbed(name)
    with tempfile.TemporaryDirectory(dir=inputs().folder) as folder:
        out, script = Path(folder) / "out", Path(folder) / "typed.py"
        out.mkdir()
        script.write_text(SCRIPT)
        line = [sys.executable, *LAUNCHERS[launcher], str(script), *line_of("finetune", out)]
        run = partial(subprocess.Popen, line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        process = run(env=_environment())
        wanted = choose.randint(0, 8)
        _until(lambda: process.poll() is not None or _steps(out) >= wanted)
        time.sleep(choose.uniform(0, 0.3))
        kill_with_all(process.pid)
        process.communicate()
        if process.returncode == 0:
            return f"{launcher}: over before the kill"
        halves = broken(out)
        assert not halves, f"half-written after the kill: {halves}"
        process = run(env=_environment())
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-500:]
        different = differing(products(out), undisturbed(name).products)
        assert not different, f"differs from the undisturbed run: {different}"
    return f"{launcher}: resumed"


def _environment() -> dict[str, str]:
    places = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}


def _until(happened: Callable[[], bool]) -> None:
    limit = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.01)


def _steps(out: Path) -> int:
    """Models written so far, roughly: the checkpoint's number cannot be read while it changes."""
    found = [path for path in files(out) if path.name == "record.json"]
    if not found:
        return 0
    text = found[0].read_text()
    place = text.rfind('"steps_done": ')
    return int(text[place + 14 :].split(",")[0]) if place >= 0 else 0


def campaigns() -> dict[str, Callable[[int], str]]:
    """By name. Without the packages of a command it is left out."""
    names = ["finetune", "finetune, two processes", "plan", "sweep"]
    if importlib.util.find_spec("pyarrow"):
        names += ["predict", "embed"]
    found: dict[str, Callable[[int], str]] = {f"kills: {name}": partial(case, name) for name in names}
    found["kills: export"] = _export
    found["kills: one of two processes"] = one_of_two
    found["kills: real command lines"] = real
    return found


def _export(seed: int) -> str:
    return case("export torch" if seed % 2 or not importlib.util.find_spec("onnxscript") else "export", seed)
