"""Something that a command needs runs out: it says so in one line, leaves nothing half-written, and works later."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tests.faults.children import finished
from tests.faults.kills import Moment, killed
from tests.faults.subjects import WRITING, Subject, inputs, subjects, undisturbed
from tests.faults.wholeness import broken, differing, files, products

WRITERS = (*WRITING, "save_pruned")
"""What is tried in turn."""
ROOM = "64m"
"""Of a file system that has room again."""


class NotPermittedError(RuntimeError):
    """This machine, or this user, may not bring a fault about."""


class Fault(NamedTuple):
    """Something is missing."""

    prepare: Callable[[], None]
    """What the child does first."""
    lift: Callable[[], object]
    """There is enough again."""
    may_end: tuple[int, ...] = ()
    """Signals by which a library may end the process: torch's and V8's C++ have no other answer to a lack of memory."""


def nothing() -> None:
    return


# --- the faults ---------------------------------------------------------------------------------------------------


def full_disk(subject: Subject, choose: random.Random, out: Path, stack: ExitStack) -> Fault:
    """A file system with less room than the output needs, at times with enough."""
    room = int(undisturbed(subject.name).total * choose.uniform(0, 1.2))
    again = mounted(out, str(max(room, 4096)), stack)
    return Fault(nothing, lambda: again(f"size={ROOM}"))


def read_only_disk(subject: Subject, choose: random.Random, out: Path, stack: ExitStack) -> Fault:
    again = mounted(out, ROOM, stack)
    again("ro")
    return Fault(nothing, lambda: again("rw"))


def mounted(folder: Path, size: str, stack: ExitStack) -> Callable[[str], None]:
    """A file system in a folder until the stack is closed; returns what mounts it anew with other options.

    Raises:
        NotPermittedError: Mounting is for root.
    """
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    return lambda options: _mount("-o", f"remount,{options}", str(folder))


def _mount(*options: str) -> None:
    try:
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
    except FileNotFoundError:
        raise NotPermittedError("there is no mount here") from None
    if done.returncode:
        raise NotPermittedError(f"mount is not permitted ({done.stderr.strip()})")


def read_only_folder(subject: Subject, choose: random.Random, out: Path, stack: ExitStack) -> Fault:
    """From the start on nothing may be made in the folder."""
    out.chmod(0o555)
    return Fault(obey_permissions, lambda: out.chmod(0o755))


def permission_lost(subject: Subject, choose: random.Random, out: Path, stack: ExitStack) -> Fault:
    """After a few files nothing may be made in any of its folders."""
    last = choose.randint(0, 12 if subject.name == "finetune" else 3)

    def prepare() -> None:
        obey_permissions()
        replace, calls = Path.replace, count()

        def losing(path: Path, target: Path) -> Path:
            if next(calls) == last:
                for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
                    folder.chmod(0o555)
            return replace(path, target)

        Path.replace = losing  # type: ignore[assignment, method-assign]

    def lift() -> None:
        for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
            folder.chmod(0o755)

    return Fault(prepare, lift)


CAP_DAC_OVERRIDE, CAPABILITIES_3 = 1, 0x20080522


def obey_permissions() -> None:
    """In a child of root: give up writing where permissions forbid it.

    Raises:
        NotPermittedError: The system has no such thing.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0)
    held = (ctypes.c_uint32 * 6)()
    if not hasattr(libc, "capget") or libc.capget(header, held):
        raise NotPermittedError("root cannot give up a capability here")
    for place in (0, 1):  # effective, permitted
        held[place] &= ~(1 << CAP_DAC_OVERRIDE)
    if libc.capset(header, held):
        raise NotPermittedError("root cannot give up a capability here")


def short_files(subject: Subject, choose: random.Random, out: Path, stack: ExitStack) -> Fault:
    """No file may be larger than so many bytes; the write that goes beyond is cut, and the next one fails."""
    limit = int(undisturbed(subject.name).largest ** choose.uniform(0.2, 1.02))
    return Fault(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), nothing)


def few_handles(subject: Subject, choose: random.Random, out: Path, stack: ExitStack) -> Fault:
    """Only a few more files may be open."""
    more = choose.randint(0, 5)

    def prepare() -> None:
        free = os.dup(2)
        os.close(free)
        limit = free + more
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    return Fault(prepare, nothing)


def little_memory(subject: Subject, choose: random.Random, out: Path, stack: ExitStack) -> Fault:
    """Only a little more memory may be taken."""
    more = int(2 ** choose.uniform(20, 29))

    def prepare() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return Fault(prepare, nothing, may_end=(signal.SIGABRT, signal.SIGTRAP))


FAULTS: Mapping[str, Callable[[Subject, random.Random, Path, ExitStack], Fault]] = MappingProxyType(
    {
        "full disk": full_disk,
        "read-only disk": read_only_disk,
        "read-only folder": read_only_folder,
        "permission lost": permission_lost,
        "short files": short_files,
        "few handles": few_handles,
        "little memory": little_memory,
    }
)


# --- what is expected ---------------------------------------------------------------------------------------------


def case(fault: str, seed: int) -> str:
    """One command meets one fault, and runs again without it.

    Raises:
        AssertionError: A traceback, a word too many, half a file, or another result.
    """
    name = WRITERS[seed % len(WRITERS)]
    try:
        return meet(name, FAULTS[fault], random.Random(f"{fault} {seed}"))
    except NotPermittedError as error:
        return f"not tried: {error}"
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def meet(name: str, fault: Callable[..., Fault], choose: random.Random) -> str:
    """A subject meets a fault."""
    subject = subjects()[name]
    expected = undisturbed(name).products
    with tempfile.TemporaryDirectory(dir=inputs().folder) as folder, ExitStack() as stack:
        out, said = Path(folder) / "out", Path(folder) / "said"
        out.mkdir()
        met = fault(subject, choose, out, stack)

        def run() -> int:
            met.prepare()
            return subject.run(out)

        try:
            status, _ = finished(run, said)
        finally:
            met.lift()
        ended = -status in met.may_end
        if ended:
            assert not (halves := broken(out)), f"half-written: {halves}"
        elif status:
            check_refusal(status, said.read_text(), out)
        else:
            assert not (wrong := differing(products(out), expected)), (
                f"said it was done, and differs: {wrong}"
            )
        status_again, _ = finished(lambda: subject.run(out), said)
        assert status_again == 0, f"fails without the fault as well: {said.read_text()[-500:]}"
        assert not (wrong := differing(products(out), expected)), f"differs after the fault: {wrong}"
    if ended:
        return "ended by a library, then done"
    return "refused in one line, then done" if status else "done all the same"


def check_refusal(status: int, said: str, out: Path) -> None:
    """One line, and no half of a file under a final name."""
    assert status == 1, f"ended with {status}: {said[-500:]}"
    assert "Traceback" not in said, said[-500:]
    errors = [line for line in said.splitlines() if line.startswith("cpvit: error: ")]
    assert len(errors) == 1, f"{len(errors)} lines: {said[-500:]}"
    assert not (halves := broken(out)), f"half-written: {halves}"


def clock_set_back(seed: int) -> str:
    """The hour jumps back between two runs, and within the second; images are from 2037 or 1970.

    Raises:
        AssertionError: The second run fails, or makes something else.
    """
    name = WRITERS[seed % len(WRITERS)]
    subject, choose = subjects()[name], random.Random(seed)
    expected = undisturbed(name).products
    for path in files(inputs().data):
        moment = choose.choice((0, 2**31 - 2))
        os.utime(path, (moment, moment))
    with tempfile.TemporaryDirectory(dir=inputs().folder) as folder:
        out, said = Path(folder) / "out", Path(folder) / "said"
        out.mkdir()
        killed(
            subject,
            out,
            said,
            Moment("a random time", choose.uniform(0, undisturbed(name).seconds), 0, False, 0),
        )

        def run() -> int:
            now, calls = time.time(), count()
            time.time = lambda: now - 1e6 - 3600 * next(calls)
            time.time_ns = lambda: int(1e9 * time.time())
            return subject.run(out)

        status, _ = finished(run, said)
        assert status == 0, f"{name}: {said.read_text()[-500:]}"
        assert not (wrong := differing(products(out), expected)), f"{name} differs: {wrong}"
    return "done all the same"


def campaigns() -> dict[str, Callable[[int], str]]:
    """By name; faults that only Linux can bring about are left out elsewhere."""
    if not sys.platform.startswith("linux"):
        return {"resources: clock set back": clock_set_back}
    found: dict[str, Callable[[int], str]] = {f"resources: {name}": partial(case, name) for name in FAULTS}
    return found | {"resources: clock set back": clock_set_back}
