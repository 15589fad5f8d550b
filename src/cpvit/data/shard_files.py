"""What a shard holds, as WebDataset keeps it: the files of one sample follow each other and share a stem.

`000017.jpg` and `000017.cls` (the class, as text) or `000017.json` (with a "label"); other files of a sample are
ignored. Python's tarfile reads the headers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from cpvit.data.archives import Extent, is_compressed, read_extent, stored_files

_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff")
_LABELS = ("cls", "json")
_LONGEST_LABEL = 1 << 20

Entry = tuple[str, Extent]
"""Name and place of a file in a shard."""


@dataclass(frozen=True)
class SampleFiles:
    """The image and the label of a sample."""

    image: Entry
    label: Entry | None


def class_of(stream: io.BufferedIOBase, shard: Path, files: SampleFiles) -> str:
    """The class that a sample's label names, a number without leading zeros.

    Raises:
        ValueError: It has no label, or none that can be used.
    """
    if files.label is None:
        raise ValueError(
            f"{shard}:{files.image[0]} has no label; expected a .cls file of the same name with the index of its "
            'class as text, or a .json file with a "label"'
        )
    name, extent = files.label
    if extent[1] > _LONGEST_LABEL:
        raise ValueError(
            f"{shard}:{name} is no label: it has {extent[1]} bytes; expected a short text or JSON"
        )
    text = read_extent(stream, extent).decode("utf-8", errors="replace").strip()
    if name.lower().endswith(".json"):
        text = _json_label(text, f"{shard}:{name}")
    return str(int(text)) if text.isdecimal() else text


def _json_label(text: str, where: str) -> str:
    try:
        return str(json.loads(text)["label"]).strip()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{where} is not JSON with a "label", but {text[:40]!r}') from error


def walk_samples(stream: io.BufferedIOBase, shard: Path) -> Iterator[SampleFiles]:
    """The samples of a shard; reads headers only. Between two of them the stream may be read elsewhere.

    Raises:
        tarfile.ReadError: The shard is truncated or damaged; see `errors_named`.
        ValueError: It is compressed, or a sample has no image, or two.
    """
    if is_compressed(shard):
        raise ValueError(
            f"{shard} is compressed, but shards are read in place; decompress it to a plain .tar"
        )
    files = (entry for entry in stored_files(stream) if not Path(entry[0]).name.startswith("."))
    for stem, group in groupby(files, key=lambda entry: _stem(entry[0])):
        yield _files(stem, list(group), shard)


def _stem(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file's own name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _files(stem: str, group: Sequence[Entry], shard: Path) -> SampleFiles:
    images, labels = _of_kind(group, stem, _IMAGES), _of_kind(group, stem, _LABELS)
    if len(images) != 1 or len({name for name, _ in group}) != len(group):
        names = ", ".join(name for name, _ in group[:6])
        raise ValueError(
            f"{shard}: sample {stem} should have one image ({', '.join(_IMAGES)}) and one label, "
            f"but its files are {names}"
        )
    # A .cls comes before a .json, which then only describes the image.
    return SampleFiles(images[0], labels[0] if labels else None)


def _of_kind(group: Iterable[Entry], stem: str, extensions: Sequence[str]) -> list[Entry]:
    """Those of the group with one of these extensions, in the order of the extensions."""
    by_extension = [(entry[0][len(stem) + 1 :].lower(), entry) for entry in group]
    return [entry for wanted in extensions for extension, entry in by_extension if extension == wanted]
