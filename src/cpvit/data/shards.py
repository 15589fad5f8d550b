"""Data sets of ImageNet's size and above, as WebDataset keeps them: many plain tars. Which files they are.

Nothing is unpacked. The webdataset package is not used, because it reads shards as a stream: its shuffle buffer
holds whatever was read so far, so that a run cannot be resumed where it stopped, nor can a sample of the images
be taken. Here the images are indexed (`cpvit.data.shard_index`), so shards are images like any other.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from cpvit.data.layout import (
    check_split,
    choose_split,
    holds_splits,
    is_junk_file,
    is_junk_folder,
    is_split_name,
)
from cpvit.data.shard_index import ShardReader, ShardSamples, ShardSource, index_shards

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

StrPath = str | os.PathLike[str]


def is_shards(source: StrPath) -> bool:
    """Whether `source` is a pattern with braces, a folder of .tar files alone, or one of such in split folders."""
    path = Path(source)
    if not path.exists():
        return _BRACES.search(str(path)) is not None
    if not path.is_dir():
        return False
    folders, files = _children(path)
    if files or not holds_splits(folders):
        return not folders and bool(files) and all(_is_tar(name) for name in files)
    return all(is_shards(path / name) for name in folders if is_split_name(name))


def open_shards(source: StrPath, *, split: str | None = None) -> ShardSource:
    """Find the shards that `source` names and the images in them.

    The headers of all shards are read once; Python's tarfile takes 30 to 90 microseconds per stored file for that,
    so minutes for ImageNet's training images.

    Args:
        source: A pattern such as `data/train-{000000..000012}.tar` (or `{a,b}`), a folder of .tar files, or
            one with such folders as train/ and val/.
        split: As in `find_samples`; changes nothing if there are no split folders.

    Raises:
        FileNotFoundError: A shard that the pattern names is not there.
        BadArchiveError: A shard is truncated, damaged or no tar.
        ValueError: No shards, a compressed one, or not the split that was asked for.

    Example:
        >>> open_shards("imagenet/train-{000000..001281}.tar")  # doctest: +SKIP
    """
    check_split(split)
    path = Path(source)
    shards, chosen = _in_folder(path, split) if path.is_dir() else (_expanded(str(path)), None)
    index = index_shards(shards)
    if not len(index):
        raise ValueError(f"no samples in the {len(shards)} shards of {path}")
    return ShardSource(
        name=path.name,
        classes=tuple(sorted(index.classes)),
        samples=ShardSamples(index, np.arange(len(index))),
        reader=ShardReader(index),
        split_name=chosen,
    )


def shard_files(source: StrPath) -> list[Path]:
    """All shards that a pattern with braces names, or that lie in a folder.

    Raises:
        FileNotFoundError: A shard that the pattern names is not there.
        ValueError: None in the folder, or folders of several splits, of which one is to be named.
    """
    path = Path(source)
    if not path.is_dir():
        return _expanded(str(path))
    shards = [path / name for name in _children(path)[1] if _is_tar(name)]
    if not shards:
        raise ValueError(
            f"no shards in {path}; expected .tar files, so name the folder (the split) that holds them"
        )
    return shards


def _in_folder(folder: Path, split: str | None) -> tuple[list[Path], str | None]:
    folders, files = _children(folder)
    if not files and holds_splits(folders):
        chosen = choose_split(folders, split, str(folder))
        return _in_folder(folder / chosen, split)[0], chosen
    shards = [folder / name for name in files if _is_tar(name)]
    if not shards:
        raise ValueError(f"no shards in {folder}; expected .tar files")
    splits = {word for name in files for word in re.split(r"[^a-z]+", name.lower()) if is_split_name(word)}
    if len(splits) > 1:
        raise ValueError(
            f"{folder} holds shards of several splits ({', '.join(sorted(splits))}, by their names); "
            f"name those you mean with braces, such as {folder / 'train-{000000..000012}.tar'}"
        )
    return shards, None


def _expanded(pattern: str) -> list[Path]:
    """The files that a pattern with braces names; all must be there."""
    paths = [Path(name) for name in _expand(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(paths)} shards of {pattern} are missing, for example {missing[0]}"
        )
    return paths


def _expand(pattern: str) -> list[str]:
    """`a-{08..10}` -> `a-08`, `a-09`, `a-10`; `{x,y}` -> `x`, `y`."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [before + choice + rest for choice in _choices(braces[1]) for rest in _expand(after)]


def _choices(inside: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",")
    first, last = numbers.groups()
    if int(first) > int(last):
        raise ValueError(f"{{{inside}}} counts down; expected a range such as {{000000..000012}}")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _children(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and files in `folder`, junk left out, sorted."""
    entries = sorted(folder.iterdir())
    return (
        [entry.name for entry in entries if entry.is_dir() and not is_junk_folder(entry.name)],
        [entry.name for entry in entries if not entry.is_dir() and not is_junk_file(entry.name)],
    )


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")
