"""Writing files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside the file and then take its place; the old content stays until the new one is complete."""
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe: nothing is to take its place
        path.write_bytes(data)
        return
    with replacing(path.resolve() if path.is_symlink() else path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to; it takes the place of ``path`` once it is complete and on the disk.

    If anything fails, the old file stays and the new one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile's, whose files nobody else may read: a plan is for everybody.
    temporary = path.with_name(f"{_prefix(path)}{uuid.uuid4().hex}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed while writing ``path`` has left beside it.

    safetensors 0.8 writes to a file of its own first (``.tmp`` and six letters), in the same folder.
    """
    drafts = [f"{_prefix(path)}*", *([".tmp??????"] if path.suffix == ".safetensors" else [])]
    for leftover in (found for draft in drafts for found in path.parent.glob(draft)):
        leftover.unlink(missing_ok=True)


@contextmanager
def os_errors() -> Iterator[None]:
    """safetensors reports a full disk as an error of its own; inside it is an OSError as everywhere else."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from None


def _prefix(path: Path) -> str:
    return f".{path.name}."
