"""Images by row: files, members of tars, rows of a Hugging Face data set. See :mod:`cpvit.bulk.listing`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cpvit.bulk.index import Index
from cpvit.bulk.requirements import required
from cpvit.data.archives import errors_named, read_extent
from cpvit.data.images import bad_image, unreadable


class Source(Protocol):
    """Images by row. Must survive pickling, because loader workers get a copy."""

    @property
    def fingerprint(self) -> str:
        """Changes if the images, their names or their order do."""
        ...

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """What the image of a row is called."""
        ...

    def read(self, row: int) -> bytes:
        """The encoded image of a row.

        Raises:
            BadImageError: It cannot be read; the others may be.
            BadArchiveError: The file that holds it is damaged.
        """
        ...


@dataclass(frozen=True)
class FilesSource:
    """Files below ``root``, by the relative (or absolute) paths of an index."""

    root: Path
    index: Index
    fingerprint: str

    def __len__(self) -> int:
        return len(self.index)

    def key(self, row: int) -> str:
        """The path, as listed."""
        path: str = self.index.row(row)["key"]
        return path

    def read(self, row: int) -> bytes:
        """The bytes of the file."""
        path = self.root / self.key(row)
        try:
            return path.read_bytes()
        except OSError as error:
            raise unreadable(str(path), error) from error


@dataclass(frozen=True)
class MembersSource:
    """Members of plain tars, read in place."""

    archives: tuple[Path, ...]
    index: Index
    fingerprint: str

    def __len__(self) -> int:
        return len(self.index)

    def key(self, row: int) -> str:
        """The member's name; of shards ``<shard>:<name>``."""
        name: str = self.index.row(row)["key"]
        return name

    def read(self, row: int) -> bytes:
        """The bytes of the member."""
        values = self.index.row(row)
        path = self.archives[values["archive"]]
        with errors_named(path), path.open("rb") as stream:
            return read_extent(stream, (values["offset"], values["length"]))


@dataclass
class DatasetSource:
    """A folder that ``datasets.Dataset.save_to_disk`` wrote; keys are row numbers. It is memory-mapped by itself."""

    folder: Path
    column: str
    fingerprint: str
    rows: int
    _opened: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    def __len__(self) -> int:
        return self.rows

    def key(self, row: int) -> str:
        """The number of the row."""
        return str(row)

    def read(self, row: int) -> bytes:
        """The encoded image."""
        if self._opened is None:
            self._opened = _undecoded(load_dataset(self.folder), self.column)
        image = self._opened[row][self.column]
        if image is None:
            raise bad_image(f"row {row} of {self.folder}", "it is null")
        if image["bytes"] is not None:
            encoded: bytes = image["bytes"]
            return encoded
        try:
            return Path(image["path"]).read_bytes()
        except OSError as error:
            raise unreadable(image["path"], error) from error


def load_dataset(folder: Path) -> Any:
    """A data set of ``datasets``, memory-mapped.

    Raises:
        ValueError: The folder holds several splits.
    """
    found = required("datasets").load_from_disk(str(folder))
    if isinstance(found, dict):
        raise ValueError(
            f"{folder} holds several splits ({', '.join(found)}); name one, such as {folder / next(iter(found))}"
        )
    return found


def _undecoded(dataset: Any, column: str) -> Any:
    return dataset.select_columns([column]).cast_column(column, required("datasets").Image(decode=False))
