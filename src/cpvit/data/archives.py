"""Images in a tar archive, plain or compressed, read in place: nothing is ever unpacked to disk.

The archive is indexed once: for each image the offset and size of its bytes in the (uncompressed) stream.
Names in the archive only serve as keys, so absolute names and `..` cannot reach any file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cpvit.data.images import decode
from cpvit.data.layout import (
    choose_split,
    classes_by_parent_folder,
    holds_splits,
    is_junk_file,
    is_junk_folder,
    shared_tops,
)
from cpvit.data.records import ImageSource, Reader, make_source

# Recognised by their first bytes, because a name is only a promise.
_COMPRESSIONS: dict[bytes, Callable[[Path], io.BufferedIOBase]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_READ_ERRORS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)
_CHUNK = 1 << 20

Extent = tuple[int, int]


class BadArchiveError(ValueError):
    """A file is not a tar archive, or is truncated or damaged; the message names it and the cause."""


@dataclass(frozen=True)
class TarReader:
    """Random access to a plain tar.

    Each read opens the file anew, which costs microseconds beside decoding, so that loader workers share
    nothing.
    """

    path: Path
    extents: Mapping[str, Extent]

    def read(self, key: str) -> Image.Image:
        """The RGB image of the member `key`."""
        with errors_named(self.path), self.path.open("rb") as stream:
            data = read_extent(stream, self.extents[key])
        return decode(data, f"{self.path}:{key}")

    def select(self, keys: Iterable[str]) -> Reader:
        """A reader with the index of `keys` only."""
        return TarReader(self.path, {key: self.extents[key] for key in keys})


@dataclass(frozen=True)
class CompressedTarReader:
    """Access to a compressed tar, which can only be read from the start: select what you need, then read."""

    path: Path
    extents: Mapping[str, Extent]

    def read(self, key: str) -> Image.Image:
        """The RGB image of the member `key`; decompresses everything before it, so prefer `select`."""
        return self.select([key]).read(key)

    def select(self, keys: Iterable[str]) -> Reader:
        """The encoded bytes of `keys`, fetched into memory in one pass that ends at the last of them."""
        by_offset = sorted(keys, key=lambda key: self.extents[key])
        with errors_named(self.path), _open_stream(self.path) as stream:
            encoded = {key: read_extent(stream, self.extents[key]) for key in by_offset}
        return MemoryReader(self.path, encoded)


@dataclass(frozen=True)
class MemoryReader:
    """Encoded images held in memory."""

    path: Path
    encoded: Mapping[str, bytes]

    def read(self, key: str) -> Image.Image:
        """The RGB image of the member `key`."""
        return decode(self.encoded[key], f"{self.path}:{key}")

    def select(self, keys: Iterable[str]) -> Reader:
        """A reader with the bytes of `keys` only."""
        return MemoryReader(self.path, {key: self.encoded[key] for key in keys})


def find_in_archive(path: Path, split: str | None) -> ImageSource:
    """List the images of a tar archive. Layouts: see `find_samples`."""
    with errors_named(path), _open_stream(path) as stream:
        extents = _index(stream)
    if not extents:
        raise ValueError(f"no images in {path}; expected members named <class>/<image>")
    locations = {key: tuple(key.split("/")[:-1]) for key in extents}
    depth, chosen = _choose(list(locations.values()), split, str(path))
    if chosen is not None:
        locations = {key: dirs for key, dirs in locations.items() if dirs[depth : depth + 1] == (chosen,)}
        depth += 1
    classes = classes_by_parent_folder([dirs[depth:] for dirs in locations.values()])
    reader = (CompressedTarReader if is_compressed(path) else TarReader)(path, extents)
    return make_source(path.name, list(locations), classes, reader, split=chosen)


def _choose(locations: list[tuple[str, ...]], split: str | None, where: str) -> tuple[int, str | None]:
    """How many folders wrap the data, and the split folder below them, if there are splits."""
    depth = shared_tops(locations)
    folders = {location[depth] for location in locations if len(location) > depth}
    return depth, choose_split(folders, split, where) if holds_splits(folders) else None


def _index(stream: io.BufferedIOBase) -> dict[str, Extent]:
    """Where each image lies in the stream, without links, devices and junk; of a repeated name the last."""
    return {key: extent for name, extent in stored_files(stream) if (key := member_key(name)) is not None}


def stored_files(stream: io.BufferedIOBase) -> Iterator[tuple[str, Extent]]:
    """Name and place of each regular file in an uncompressed tar; reads headers, skips what lies between.

    Between two of them the stream may be read elsewhere.

    Raises:
        tarfile.ReadError: The tar is truncated or damaged; see `errors_named`.
    """
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in archive:
            if not member.isfile():
                continue
            if member.issparse():
                raise tarfile.ReadError(f"{member.name} is stored as a sparse file, which is not supported")
            if "\0" in member.name:
                raise tarfile.ReadError(f"{member.name!r} has a NUL in its name, which no file can have")
            yield member.name, (member.offset_data, member.size)
        check_end(stream, archive.offset)


def check_end(stream: io.BufferedIOBase, end: int) -> None:
    """Python's tarfile takes a damaged header for the end of the archive; a real end is a block of zeros."""
    stream.seek(end)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is truncated or damaged at byte {end}: no header and no end mark there")
    # To the very end, where gzip and the like keep the checksum.
    while stream.read(_CHUNK):
        pass


def member_key(name: str) -> str | None:
    """The member's name without the parts that mean nothing inside an archive; None for junk."""
    *folders, file = [part for part in name.split("/") if part not in ("", ".", "..")] or [""]
    if not file or is_junk_file(file) or any(is_junk_folder(folder) for folder in folders):
        return None
    return "/".join((*folders, file))


def is_compressed(path: Path) -> bool:
    """Whether a file begins as gzip, bzip2 or xz does."""
    return _opener(path) is not None


def _opener(path: Path) -> Callable[[Path], io.BufferedIOBase] | None:
    """How to open a compressed file; None for a plain one."""
    with path.open("rb") as stream:
        start = stream.read(6)
    return next((opener for magic, opener in _COMPRESSIONS.items() if start.startswith(magic)), None)


def _open_stream(path: Path) -> io.BufferedIOBase:
    """The uncompressed stream of the archive."""
    opener = _opener(path)
    return path.open("rb") if opener is None else opener(path)


def read_extent(stream: io.BufferedIOBase, extent: Extent) -> bytes:
    """The bytes of a stored file."""
    offset, size = extent
    stream.seek(offset)
    data = stream.read(size)
    if len(data) != size:
        raise tarfile.ReadError(f"it ends within the member at byte {offset}")
    return data


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Whatever goes wrong in reading the archive is reported with its name."""
    try:
        yield
    except _READ_ERRORS as error:
        raise BadArchiveError(
            f"cannot read {path} as a tar archive (.tar, .tar.gz, .tgz, .tar.bz2, .tar.xz): {error}; "
            "if it is one, copy or download it again"
        ) from error
