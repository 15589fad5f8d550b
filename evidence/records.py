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
CALL = "import sys; from cpvit.commands.cli import main; sys.exit(main())"


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


def run(command: Sequence[str], before: Sequence[Sequence[str]], inputs: Sequence[Path]) -> str:
    """Call ``cpvit`` in a folder that holds links to every input file, so that no path gets into the record.

    Args:
        command: Arguments, without ``--json``.
        before: Calls that must be made first, in the same folder.
        inputs: Folders in which the files that the commands name are looked for.

    Returns:
        The record, as JSON.

    Raises:
        FileNotFoundError: A file that the command names is in none of the folders.
        subprocess.CalledProcessError: The command failed; its words are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for word in dict.fromkeys(word for call in (*before, command) for word in call):
            _link(word, place, inputs)
        for call in before:
            _call(call, place)
        _call([*command, "--json", "record.json"], place)
        record = json.loads(place.joinpath("record.json").read_text())
    return (
        json.dumps({**record, "made_by": {**record.get("made_by", {}), **_made_by(command)}}, indent=1) + "\n"
    )


def _made_by(command: Sequence[str]) -> dict[str, str]:
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "command": shlex.join(["cpvit", *command]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
    }


def _call(arguments: Sequence[str], place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(_whole, sys.path)))}
    subprocess.run([sys.executable, "-c", CALL, *arguments], cwd=place, env=environment, check=True)


def _whole(entry: str) -> str:
    return str(Path(entry).resolve()) if entry else ""


def _link(word: str, place: Path, inputs: Sequence[Path]) -> None:
    if Path(word).suffix not in (".safetensors", ".tar"):
        return
    found = [folder / word for folder in inputs if (folder / word).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{word} is in none of {', '.join(map(str, inputs)) or 'the folders (none given)'}; "
            "name the folders that hold weights and images by --inputs"
        )
    (place / word).symlink_to(found[0].resolve())
