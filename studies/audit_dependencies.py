"""Which installed packages have a published vulnerability? Looked up in a copy of PyPA's database, without a network.

    git clone https://github.com/pypa/advisory-database
    python studies/audit_dependencies.py advisory-database

What ``pip-audit`` does where it reaches PyPI. Run it in the environment that is to be judged.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml
from packaging.version import Version


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("database", type=Path, help="folder that holds vulns/")
    database = parser.parse_args().database / "vulns"
    if not database.is_dir():
        raise SystemExit(f"{database} is no folder; give a clone of github.com/pypa/advisory-database")
    installed = {normal(found.metadata["Name"]): Version(found.version) for found in distributions()}
    seen = 0
    for package, version in sorted(installed.items()):
        for advisory in advisories(database, package):
            seen += 1
            if any(affects(entry, version) for entry in advisory.get("affected", ())):
                names = ", ".join([advisory["id"], *advisory.get("aliases", ())])
                print(f"{package} {version}: {names}: {' '.join(advisory['details'].split())[:160]}")
    print(f"{len(installed)} packages, {seen} advisories about them")


def normal(name: str) -> str:
    """As PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def advisories(database: Path, package: str) -> Iterator[Any]:
    """Those about a package that stand."""
    for path in sorted((database / package).glob("*.yaml")):
        advisory = yaml.safe_load(path.read_text())
        if "withdrawn" not in advisory:
            yield advisory


def affects(entry: Any, version: Version) -> bool:
    """Whether a version is listed, or lies in a range (OSV schema, "events")."""
    if str(version) in entry.get("versions", ()):
        return True
    return any(_within(found["events"], version) for found in _of_versions(entry))


def _of_versions(entry: Any) -> list[Any]:
    return [found for found in entry.get("ranges", ()) if found["type"] == "ECOSYSTEM"]


def _within(events: list[dict[str, str]], version: Version) -> bool:
    inside = False
    for event in events:
        (kind, at) = next(iter(event.items()))
        if kind == "introduced" and version >= Version(at):
            inside = True
        elif (kind == "fixed" and version >= Version(at)) or (
            kind == "last_affected" and version > Version(at)
        ):
            inside = False
    return inside


if __name__ == "__main__":
    main()
