"""Images in a directory: class folders, split folders with class folders, or simply images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cpvit.data.images import decode, unreadable
from cpvit.data.layout import (
    choose_split,
    classes_by_first_folder,
    holds_splits,
    is_junk_file,
    is_junk_folder,
    is_split_name,
)
from cpvit.data.records import ImageSource, make_source


@dataclass(frozen=True)
class FolderReader:
    """Reads files below `root`; keys are relative paths."""

    root: Path

    def read(self, key: str) -> Image.Image:
        """The RGB image in the file `root/key`."""
        path = self.root / key
        try:
            data = path.read_bytes()
        except OSError as error:
            raise unreadable(str(path), error) from error
        return decode(data, str(path))

    def select(self, keys: Iterable[str]) -> FolderReader:
        """Itself: files are found by name."""
        return self


def find_in_folder(root: Path, split: str | None) -> ImageSource:
    """List the images below `root`; only the chosen split is walked. Layouts: see `find_samples`."""
    base, chosen = _enter(root, split)
    paths = list(_walk(base, ()))
    if not paths:
        raise ValueError(f"no images in {base}; expected <class>/<image> folders, or images")
    prefix = base.relative_to(root).parts
    keys = ["/".join(prefix + path) for path in paths]
    classes = classes_by_first_folder([path[:-1] for path in paths])
    return make_source(root.resolve().name, keys, classes, FolderReader(root), split=chosen)


def _enter(root: Path, split: str | None) -> tuple[Path, str | None]:
    """The folder whose subfolders are the classes, and its name if it is a split."""
    base = root
    while True:
        folders, files = _children(base)
        if holds_splits(folders):
            chosen = choose_split(folders, split, str(base))
            return base / chosen, chosen
        if files or len(folders) != 1 or not _wraps(base / folders[0]):
            return base, None
        base = base / folders[0]


def _wraps(folder: Path) -> bool:
    """Whether a lone folder only wraps the data (folders and no images in it) rather than being a class."""
    folders, files = _children(folder)
    return bool(folders) and not files and not is_split_name(folder.name)


def _children(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the subfolders and of the files of `folder`, junk left out, sorted."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                folders += [] if is_junk_folder(entry.name) else [entry.name]
            elif not is_junk_file(entry.name):
                files.append(entry.name)
    return sorted(folders), sorted(files)


def _walk(
    folder: Path, above: tuple[str, ...], seen: frozenset[Path] = frozenset()
) -> Iterator[tuple[str, ...]]:
    """Relative paths of all files below `folder`; links are followed, but not in circles."""
    real = folder.resolve()
    if real in seen:
        return
    folders, files = _children(folder)
    for name in files:
        yield (*above, name)
    for name in folders:
        yield from _walk(folder / name, (*above, name), seen | {real})
