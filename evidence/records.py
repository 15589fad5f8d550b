"""Reading and running records."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

Loaded: TypeAlias = Mapping[str, Any]
"""Records by name."""
CPVIT = ("-c", "import sys; from cpvit.commands.cli import main; sys.exit(main())")
STUDIES = Path(__file__).parents[1] / "studies"
INPUTS = (".safetensors", ".tar", ".gz")


def load(path: Path) -> Any:
    """A record that was committed.

    Raises:
        FileNotFoundError: It was not made yet; the message says how.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is missing from records/; make it: python -m evidence {path.stem} --inputs FOLDER"
        )
    return json.loads(path.read_text())


def run(
    command: Sequence[str], before: Sequence[Sequence[str]], inputs: Sequence[Path], study: str = ""
) -> str:
    """Call ``cpvit`` in a folder that holds links to every input file, so that no path gets into the record.

    Args:
        command: Arguments, without ``--json``.
        before: Calls that must be made first, in the same folder. They are left out if what they make (files that the
            command names within a folder, ``dense/best/model.safetensors``) is in the folders of ``inputs``.
        inputs: Folders in which the files and folders that the commands name are looked for.
        study: File of ``studies/`` that is called in the place of ``cpvit``.

    Returns:
        The record, as JSON.

    Raises:
        FileNotFoundError: A file that the command names is in none of the folders.
        subprocess.CalledProcessError: The command failed; its words are on stderr.
    """
    made = [word for word in command if "/" in word]
    if made and all(_found(word, inputs) for word in made):
        before = ()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for word in dict.fromkeys(word for call in (*before, command) for word in call):
            if word in command or Path(word).suffix in INPUTS:  # a call before may make a folder of that name
                _link(word, place, inputs, needed=not (before and "/" in word))
        for call in before:
            _call([*CPVIT, *call], place)
        program = [str(STUDIES / f"{study}.py")] if study else CPVIT
        _call([*program, *command, "--json", "record.json"], place)
        record = json.loads(place.joinpath("record.json").read_text())
    made_by = {**record.get("made_by", {}), **_made_by(typed(command, study))}
    return json.dumps({**record, "made_by": made_by}, indent=1) + "\n"


def typed(command: Sequence[str], study: str = "") -> str:
    """The command as one types it."""
    return shlex.join([*(["python", f"studies/{study}.py"] if study else ["cpvit"]), *command])


def _made_by(command: str) -> dict[str, str]:
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "command": command,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
    }


def _call(arguments: Sequence[str], place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(_whole, sys.path)))}
    subprocess.run([sys.executable, *arguments], cwd=place, env=environment, check=True)


def _whole(entry: str) -> str:
    return str(Path(entry).resolve()) if entry else ""


def _found(word: str, inputs: Sequence[Path]) -> Path | None:
    return next((folder / word for folder in inputs if (folder / word).exists()), None)


def _link(word: str, place: Path, inputs: Sequence[Path], *, needed: bool) -> None:
    """Weights and images must be found; a folder, or what a call before may make, is linked if it is there."""
    found = None if word.startswith("-") else _found(word, inputs)
    if found is not None:
        (place / word).parent.mkdir(parents=True, exist_ok=True)
        (place / word).symlink_to(found.resolve())
    elif needed and Path(word).suffix in INPUTS:
        raise FileNotFoundError(
            f"{word} is in none of {', '.join(map(str, inputs)) or 'the folders (none given)'}; "
            "name the folders that hold weights and images by --inputs"
        )
