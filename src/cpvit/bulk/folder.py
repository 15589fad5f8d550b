"""The folder of a run: its fingerprint, the list of its images, and whether it may be begun or continued.

``_run.json`` says what decides the output; a run goes on only if all of it is the same. ``_index.arrow`` is the list of
images while the run lasts. Readers of Parquet folders pass over names that begin with an underscore.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpvit.bulk.parts import Parts
from cpvit.files import remove_leftovers, write_atomically
from cpvit.finetune.fingerprint import differences

RUN, INDEX = "_run.json", "_index.arrow"


def check_folder(folder: Path, data: str, *, resume: bool) -> None:
    """Refuse a folder that holds something else, or a run that was not asked to go on.

    Raises:
        ValueError: The reason.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give a folder")
    source = Path(data).expanduser()
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"--out {folder} lies in {source}, so that the output would be taken for images; give a folder elsewhere"
        )
    if (folder / RUN).exists():
        if not resume:
            raise ValueError(
                f"{folder} holds a run already; add --resume to go on with it, or give another --out"
            )
        return
    # A run that was killed before it was begun leaves the list of images, or a part of it.
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    found = [name for name in names if name != INDEX and not name.startswith(".")]
    if found:
        raise ValueError(f"{folder} is not empty ({found[0]}); give a new folder, or an empty one")


def begin(
    parts: Parts, fingerprint: Mapping[str, Any], on_message: Callable[[str], None] = lambda _: None
) -> None:
    """Begin a run, or go on with the one in the folder. One process does this, before any part is made.

    Raises:
        ValueError: The run in the folder was begun with another fingerprint.
    """
    folder = parts.folder
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RUN
    values = _as_json(fingerprint)
    if file.exists():
        refuse_other(folder, values)
    else:
        write_atomically(file, json.dumps(values, indent=2, sort_keys=True) + "\n")
    remove_leftovers(file)
    parts.remove_leftovers()
    for path in parts.remove_damaged():
        on_message(f"{path} was damaged and is made again")


def refuse_other(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Raise ValueError if the run in the folder was begun with another fingerprint."""
    try:
        then = json.loads((folder / RUN).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {folder / RUN}: {error}; give another --out") from None
    found = differences(then, _as_json(fingerprint))
    if found:
        shown = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
        raise ValueError(
            f"the run in {folder} was begun differently and cannot go on like this: {shown}; give what it was begun "
            "with, or another --out"
        )


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def finish(parts: Parts) -> None:
    """Tidy up once all parts are there."""
    (parts.folder / INDEX).unlink(missing_ok=True)
    remove_leftovers(parts.folder / INDEX)
    parts.remove_leftovers()
