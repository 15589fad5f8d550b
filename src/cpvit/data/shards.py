"""Data sets of ImageNet's size and above, as WebDataset keeps them: many plain tars, read from front to back.

The files of one sample follow each other and share a stem: `000017.jpg` and `000017.cls` (the class, as text)
or `000017.json` (with a "label"). Nothing is unpacked and no index of the samples is held.

This reads the format without the webdataset package, because what that lacks is needed here: it shuffles
through a buffer whose state depends on all that was read, so that a run cannot be resumed where it stopped.
Here the order of an epoch is computed beforehand from the shards' sizes (`cpvit.data.order.StreamOrder`).
Every process and loader worker walks through the same order and keeps what belongs to its own batches: of the
other samples it reads the headers and seeks over the contents, and shards with nothing for it are not opened.
So any step can be started at, and the batches do not depend on how many processes and workers share the work.
The price is that headers are read by every worker (about 30 microseconds per stored file), where spreading
whole shards over workers would read each once.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cpvit.data.archives import (
    BadArchiveError,
    Extent,
    errors_named,
    is_compressed,
    read_extent,
    stored_files,
)
from cpvit.data.images import decode
from cpvit.data.layout import (
    check_split,
    choose_split,
    holds_splits,
    is_junk_file,
    is_junk_folder,
    is_split_name,
)
from cpvit.data.order import Share, stream_order

_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff")
_LABELS = ("cls", "json")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SIZES = "sizes.json"

StrPath = str | os.PathLike[str]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardSource:
    """Shards a user named, in order, and how many samples each holds."""

    name: str
    shards: tuple[Path, ...]
    sizes: tuple[int, ...]
    split_name: str | None = None

    def __len__(self) -> int:
        return sum(self.sizes)

    def limited(self, limit: int | None, seed: int = 0) -> ShardSource:
        """Itself for None or a limit that is no limit; a smaller one is refused, since samples have no index.

        As in `ImageSource`, so that callers need not tell the two apart.
        """
        if limit is None or limit >= len(self):
            return self
        raise ValueError(
            f"cannot take {limit} of the {len(self)} samples of {self.name}: shards are read from front to "
            "back; name fewer of them with braces, such as train-{000000..000003}.tar, or give a folder or a "
            "tar of class folders"
        )

    def split(self, count: int, seed: int = 0) -> tuple[ShardSource, ShardSource]:
        """Refused, for the same reason."""
        raise ValueError(
            f"cannot set {count} of the {len(self)} samples of {self.name} apart: shards are read from front "
            "to back; name different shards with braces, such as train-{000000..000003}.tar, for either part"
        )


@dataclass(frozen=True)
class ShardSample:
    """One sample as it is stored.

    Attributes:
        shard: The tar.
        image_name: Its image's name in there.
        image: The encoded image.
        label_name: The name of its label in there; empty if it has none.
        label: The label as it is stored.
    """

    shard: Path
    image_name: str
    image: bytes
    label_name: str
    label: bytes

    @property
    def name(self) -> str:
        """What errors call it, and its key."""
        return f"{self.shard}:{self.image_name}"

    def decoded(self) -> Image.Image:
        """The RGB image; raises BadImageError if it cannot be decoded."""
        return decode(self.image, self.name)

    def label_in(self, labels: Mapping[str, int]) -> int:
        """The label among `labels`; raises ValueError if there is none."""
        found = self._class()
        if found in labels:
            return labels[found]
        names = sorted(labels, key=labels.__getitem__)
        shown = f"{names[0]} to {names[-1]}" if len(names) > 1 else ", ".join(names)
        raise ValueError(
            f"{self.shard}:{self.label_name} has label {found!r}; expected one of the {len(names)} classes "
            f"{shown}: use a model of these classes, or write the shards anew with the right labels"
        )

    def _class(self) -> str:
        if not self.label_name:
            raise ValueError(
                f"{self.name} has no label; expected a .cls file of the same name with the index of its class "
                'as text, or a .json file with a "label"'
            )
        text = self.label.decode("utf-8", errors="replace").strip()
        if self.label_name.lower().endswith(".json"):
            text = self._json_label(text)
        return str(int(text)) if text.isdecimal() else text

    def _json_label(self, text: str) -> str:
        try:
            return str(json.loads(text)["label"]).strip()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{self.shard}:{self.label_name} is not JSON with a "label", but {text[:40]!r}'
            ) from error


@dataclass(frozen=True)
class _Files:
    """Where the image and the label of a sample lie in the shard."""

    image: tuple[str, Extent]
    label: tuple[str, Extent] | None


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
    """Find the shards that `source` names and how many samples they hold.

    The sizes come from a `sizes.json` beside the shards (`{"train-000000.tar": 1000, ...}`) if there is one,
    and are trusted until a shard proves them wrong; else the headers of all shards are read once, about 30
    microseconds per stored file: over a minute for ImageNet, so that it pays to keep the file.

    Args:
        source: A pattern such as `data/train-{000000..000012}.tar` (or `{a,b}`), a folder of .tar files, or
            one with such folders as train/ and val/.
        split: As in `find_samples`; changes nothing if there are no split folders.

    Raises:
        FileNotFoundError: A shard that the pattern names is not there.
        BadArchiveError: A shard is truncated, damaged, compressed or no tar.
        ValueError: No shards, or not the split that was asked for.

    Example:
        >>> open_shards("imagenet/train-{000000..001281}.tar")  # doctest: +SKIP
    """
    check_split(split)
    path = Path(source)
    shards, chosen = _in_folder(path, split) if path.is_dir() else (_expanded(str(path)), None)
    sizes = _sizes(shards)
    if not sum(sizes):
        raise ValueError(f"no samples in the {len(shards)} shards of {path}")
    return ShardSource(path.name, tuple(shards), tuple(sizes), chosen)


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


# --- sizes ---


def _sizes(shards: Sequence[Path]) -> list[int]:
    known = {folder: _stored_sizes(folder / _SIZES) for folder in {shard.parent for shard in shards}}
    return [_size(shard, known[shard.parent]) for shard in shards]


def _stored_sizes(path: Path) -> Mapping[str, int] | None:
    if not path.is_file():
        return None
    try:
        sizes = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); repair it, or remove it to have shards counted"
        ) from error
    good = isinstance(sizes, dict) and all(type(size) is int and size >= 0 for size in sizes.values())
    if not good:
        raise ValueError(
            f'{path} should hold the number of samples of each shard, {{"train-000000.tar": 1000, ...}}; '
            "repair it, or remove it to have them counted"
        )
    return sizes


def _size(shard: Path, known: Mapping[str, int] | None) -> int:
    if known is None:
        with errors_named(shard), shard.open("rb") as stream:
            return sum(1 for _ in _walk(stream, shard))
    if shard.name not in known:
        raise ValueError(
            f"{shard.parent / _SIZES} does not know {shard.name}; add it, or remove the file to have shards counted"
        )
    return known[shard.name]


# --- reading ---


def read_shard(shard: Path, size: int, wanted: Mask) -> Iterator[tuple[int, ShardSample]]:
    """The samples of `shard` for which `wanted` `[size]` is true, with their index; stops at the last of them.

    Raises:
        BadArchiveError: The shard is damaged, or does not hold `size` samples.
        ValueError: A sample has no image, or two.
    """
    (indices,) = wanted.nonzero()
    if not len(indices):
        return
    last, found = int(indices[-1]), 0
    with errors_named(shard), shard.open("rb") as stream:
        for index, files in enumerate(_walk(stream, shard)):
            found = index + 1
            if found > size:
                break
            if wanted[index]:
                yield index, _read(stream, shard, files)
            if index == last < size - 1:
                return
    if found != size:
        more = "more" if found > size else f"{found}"
        raise BadArchiveError(
            f"{shard} holds {more} samples where {size} were expected; was it, or the {_SIZES} beside it, "
            f"changed? Write it again, or remove {_SIZES} to have shards counted"
        )


def _read(stream: io.BufferedIOBase, shard: Path, files: _Files) -> ShardSample:
    image_name, extent = files.image
    image = read_extent(stream, extent)
    if files.label is None:
        return ShardSample(shard, image_name, image, "", b"")
    label_name, extent = files.label
    return ShardSample(shard, image_name, image, label_name, read_extent(stream, extent))


def _walk(stream: io.BufferedIOBase, shard: Path) -> Iterator[_Files]:
    """The samples of a shard; reads headers only."""
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


def _files(stem: str, group: Sequence[tuple[str, Extent]], shard: Path) -> _Files:
    images, labels = _of_kind(group, stem, _IMAGES), _of_kind(group, stem, _LABELS)
    if len(images) != 1 or len({name for name, _ in group}) != len(group):
        names = ", ".join(name for name, _ in group[:6])
        raise ValueError(
            f"{shard}: sample {stem} should have one image ({', '.join(_IMAGES)}) and one label, "
            f"but its files are {names}"
        )
    # A .cls comes before a .json, which then only describes the image.
    return _Files(images[0], labels[0] if labels else None)


def _of_kind(
    group: Iterable[tuple[str, Extent]], stem: str, extensions: Sequence[str]
) -> list[tuple[str, Extent]]:
    """Those of the group with one of these extensions, in the order of the extensions."""
    by_extension = [(name[len(stem) + 1 :].lower(), (name, extent)) for name, extent in group]
    return [entry for wanted in extensions for extension, entry in by_extension if extension == wanted]


# --- orders ---


def in_order(source: ShardSource, wanted: Mask) -> Iterator[ShardSample]:
    """The samples at the wanted places, `[len(source)]`, of the shards laid end to end."""
    start = 0
    for shard, size in zip(source.shards, source.sizes, strict=True):
        for _, sample in read_shard(shard, size, wanted[start : start + size]):
            yield sample
        start += size


def shuffled_stream(
    source: ShardSource, share: Share, seed: int, buffer: int
) -> Iterator[tuple[int, ShardSample]]:
    """The samples of `share` with their numbers, in the order of these, without end.

    Starting late costs the computation of one epoch's order (0.2 s for ImageNet) and the headers of the
    shards from which samples are still to come; nothing is decoded.
    """
    start = share.numbers(share.first)[0]
    for epoch in count(start // len(source)):
        yield from _epoch(source, share, seed, epoch, buffer)


def _epoch(
    source: ShardSource, share: Share, seed: int, epoch: int, buffer: int
) -> Iterator[tuple[int, ShardSample]]:
    order = stream_order(source.sizes, seed, epoch, buffer)
    wanted = share.takes(order.numbers)
    due = iter(np.sort(order.numbers[wanted]).tolist())
    number = next(due, None)
    waiting: dict[int, ShardSample] = {}
    start = 0
    for file in order.files:
        shard, size = source.shards[file], source.sizes[file]
        for index, sample in read_shard(shard, size, wanted[start : start + size]):
            waiting[int(order.numbers[start + index])] = sample
            while number is not None and number in waiting:
                yield number, waiting.pop(number)
                number = next(due, None)
        start += size
