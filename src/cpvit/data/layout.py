"""Which files are images, which folder is the split, and which folder is the class: rules on names only.

Folders and archives share these rules, so a tar and the folder it was made from give the same samples.
A "location" is the tuple of folders above an image, outermost first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

_JUNK_FILES = {"thumbs.db", "desktop.ini", "readme", "license"}
_JUNK_SUFFIXES = {".txt", ".md", ".json", ".csv", ".tsv", ".xml", ".yaml", ".yml"}

_WORDNET_ID = re.compile(r"n\d{8}")

# For each split a user may ask for, the folder names that satisfy it, best first. Held-out data is often
# published under one name only (ImageNet has val/, CIFAR has test/), hence either of the two stands in.
_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
    "test": ("test", "val", "validation", "valid"),
}
_SPLIT_FOLDERS["validation"] = _SPLIT_FOLDERS["val"]
_HELD_OUT = frozenset(_SPLIT_FOLDERS["test"])
_ANY_SPLIT = _HELD_OUT | frozenset(_SPLIT_FOLDERS["train"])


def is_junk_file(name: str) -> bool:
    """Whether a file of this name is never an image: hidden, made by a system, or text beside the data."""
    lower = name.lower()
    return name.startswith(".") or lower in _JUNK_FILES or PurePosixPath(lower).suffix in _JUNK_SUFFIXES


def is_junk_folder(name: str) -> bool:
    """Whether a folder of this name never holds data: hidden, or made by macOS."""
    return name.startswith(".") or name == "__MACOSX"


def is_wordnet_id(name: str) -> bool:
    """Whether `name` is a WordNet noun id as ImageNet uses it: `n` and eight digits."""
    return _WORDNET_ID.fullmatch(name) is not None


def is_split_name(folder: str) -> bool:
    """Whether `folder` is one of the usual names of a split."""
    return folder.lower() in _ANY_SPLIT


def holds_splits(folders: Collection[str]) -> bool:
    """Whether folders that lie side by side are splits rather than classes.

    They are if all of them have a split's name, or if a training and a held-out split are both there.
    One class that happens to be called "train" (CIFAR-100 has it) does not make a split.
    """
    names = {folder.lower() for folder in folders}
    if not names:
        return False
    return names <= _ANY_SPLIT or (bool(names & {"train", "training"}) and bool(names & _HELD_OUT))


def check_split(split: str | None) -> None:
    """Refuse a split that cannot be asked for."""
    if split is not None and split not in _SPLIT_FOLDERS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(_SPLIT_FOLDERS)}, or None")


def choose_split(folders: Collection[str], split: str | None, where: str) -> str:
    """The folder among `folders` that serves `split`.

    `"test"` (and None, which means held-out data) takes test/, else val/, validation/ or valid/; `"val"`
    takes val/ first and test/ last; `"train"` takes train/ only. None never falls back to training data.
    """
    check_split(split)
    by_name = {folder.lower(): folder for folder in folders}
    for name in _SPLIT_FOLDERS[split or "test"]:
        if name in by_name:
            return by_name[name]
    found = ", ".join(f"{folder}/" for folder in sorted(folders))
    asked = "no held-out split (test/ or val/)" if split is None else f"no folder for split {split!r}"
    raise ValueError(
        f"{where} has {asked}, only {found}; choose the split you mean, or name the folder itself"
    )


def shared_tops(locations: Sequence[tuple[str, ...]]) -> int:
    """How many leading folders only wrap the data: all images lie under them, with a further folder below.

    Stops at a split, so that an archive of `test/<class>/<image>` alone is known to be a test split.
    """
    deepest = min(len(location) for location in locations) - 1
    depth = 0
    while depth < deepest:
        folders = {location[depth] for location in locations}
        if len(folders) > 1 or is_split_name(*folders):
            return depth
        depth += 1
    return max(depth, 0)


def classes_by_first_folder(locations: Sequence[tuple[str, ...]]) -> list[str | None]:
    """ImageFolder's rule: the outermost folder is the class and whatever lies deeper belongs to it."""
    wordnet = _classes_by_wordnet_id(locations)
    return wordnet or [location[0] if location else None for location in locations]


def classes_by_parent_folder(locations: Sequence[tuple[str, ...]]) -> list[str | None]:
    """The archive's rule: the folder that holds the image is the class, whatever lies above it.

    A folder inside a folder that itself holds images belongs to the outer one.
    """
    wordnet = _classes_by_wordnet_id(locations)
    if wordnet:
        return wordnet
    holding = set(locations)
    return [_outermost_holding(location, holding) for location in locations]


def _outermost_holding(location: tuple[str, ...], holding: set[tuple[str, ...]]) -> str | None:
    for depth in range(1, len(location) + 1):
        if location[:depth] in holding:
            return location[depth - 1]
    return None


def _classes_by_wordnet_id(locations: Sequence[tuple[str, ...]]) -> list[str | None]:
    """The innermost WordNet id above each image (`<id>/images/x.JPEG`), if every image has one."""
    ids: list[str | None] = []
    for location in locations:
        found = [folder for folder in location if is_wordnet_id(folder)]
        if not found:
            return []
        ids.append(found[-1])
    return ids
