"""The output of a run: Parquet files of a fixed number of rows each, every one whole or absent.

``part-00000.parquet`` holds the first rows, and so on; rows are in the order of the source. A part depends on its own
images alone, so whoever makes it, and whenever, it is the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpvit.bulk.columns import Columns
from cpvit.bulk.images import PixelBatch
from cpvit.bulk.requirements import required
from cpvit.files import replacing

KEY = b"cpvit"
"""Of the description in the metadata of the schema."""
ROW_GROUP_BYTES = 32 << 20
"""A row group is written once it takes this much, so that a part of large rows is never held whole."""


@dataclass(frozen=True)
class Parts:
    """Which rows go where."""

    folder: Path
    images: int
    rows: int
    """Of each part but the last."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"--rows-per-part is {self.rows}; expected at least 1")

    def __len__(self) -> int:
        return -(-self.images // self.rows)

    def path(self, part: int) -> Path:
        """The file of a part; names sort as the parts do."""
        digits = max(5, len(str(len(self) - 1)))
        return self.folder / f"part-{part:0{digits}d}.parquet"

    def rows_of(self, part: int) -> range:
        """The rows of a part."""
        return range(part * self.rows, min((part + 1) * self.rows, self.images))

    def missing(self) -> list[int]:
        """Parts whose file is not there."""
        return [part for part in range(len(self)) if not self.path(part).exists()]

    def remove_damaged(self) -> list[Path]:
        """Remove files with a part's name that are not that part, such as a copy cut short; returns them."""
        damaged = [
            self.path(part)
            for part in range(len(self))
            if self.path(part).exists() and _rows_in(self.path(part)) != len(self.rows_of(part))
        ]
        for path in damaged:
            path.unlink()
        return damaged

    def remove_leftovers(self) -> None:
        """Remove what processes that were killed have left half-written. No other process may be writing."""
        for leftover in self.folder.glob(".part-*"):
            leftover.unlink(missing_ok=True)


def _rows_in(path: Path) -> int | None:
    """As the footer says; None if it cannot be read."""
    pyarrow, parquet = required("pyarrow"), required("pyarrow.parquet")
    try:
        return int(parquet.read_metadata(path).num_rows)
    except (OSError, pyarrow.ArrowException):
        return None


def part_schema(columns: Columns, width: int, description: Mapping[str, Any]) -> Any:
    """Schema of every part: ``row``, ``key``, what the model gives, ``error``; the description in its metadata."""
    pyarrow = required("pyarrow")
    fields = [("row", pyarrow.int64()), ("key", pyarrow.string()), *columns.fields(width)]
    schema = pyarrow.schema([*fields, ("error", pyarrow.string())])
    return schema.with_metadata({KEY: json.dumps(description, sort_keys=True).encode()})


def read_description(path: str | Path) -> dict[str, Any]:
    """What a part says about the run that made it: model, plan, hash of the weights, preprocessing, version.

    Raises:
        ValueError: Not a part of a run of cpvit.

    Example:
        >>> read_description("labels/part-00000.parquet")["weights_sha256"]  # doctest: +SKIP
    """
    metadata = required("pyarrow.parquet").read_schema(path).metadata or {}
    if KEY not in metadata:
        raise ValueError(
            f"{path} was not written by cpvit predict or cpvit embed: its metadata has no {KEY!r}"
        )
    found: dict[str, Any] = json.loads(metadata[KEY])
    return found


def table_of(batch: PixelBatch, arrays: Mapping[str, Any], schema: Any) -> Any:
    """A batch as a table; rows of images that could not be read hold null and the reason.

    Args:
        batch: Of B images, b of them read.
        arrays: Columns of length b; without any, of length 0, all images are bad.
        schema: Of the part.
    """
    pyarrow = required("pyarrow")
    read = np.array([error is None for error in batch.errors])
    places = pyarrow.array(np.cumsum(read) - 1, mask=~read)
    columns = {
        "row": pyarrow.array(batch.rows, pyarrow.int64()),
        "key": pyarrow.array(batch.keys, pyarrow.string()),
        "error": pyarrow.array(batch.errors, pyarrow.string()),
    }
    for name, values in arrays.items():
        columns[name] = values if read.all() else values.take(places)
    nothing = len(batch.rows)
    return pyarrow.table(
        [columns.get(field.name, pyarrow.nulls(nothing, field.type)) for field in schema], schema=schema
    )


def write_part(path: Path, tables: Iterable[Any], schema: Any) -> None:
    """Write a part beside its place, and put it there when it is complete and on the disk.

    Raises:
        OSError: It could not be written (the disk is full); nothing of it is left behind.
    """
    pyarrow, parquet = required("pyarrow"), required("pyarrow.parquet")
    with (
        replacing(path) as temporary,
        parquet.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        held: list[Any] = []
        for table in tables:
            held.append(table)
            if sum(one.nbytes for one in held) >= ROW_GROUP_BYTES:
                writer.write_table(pyarrow.concat_tables(held))
                held = []
        if held:
            writer.write_table(pyarrow.concat_tables(held))
