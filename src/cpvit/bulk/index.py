"""The list of images of a run: an Arrow file, memory-mapped, of which one row at a time becomes a Python object.

Ten million paths take what the operating system caches of the file. Loader workers and the processes of a machine share
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cpvit.bulk.requirements import required
from cpvit.files import replacing

ROWS = 1 << 14
"""In each record batch of the file but the last: the batch of a row is found by division."""


class Index:
    """Rows of an index file. Pickled by its path: each process maps the file itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader: Any = None
        self._batch: tuple[int, Any] = (-1, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_reader": None, "_batch": (-1, None)}

    def _opened(self) -> Any:
        if self._reader is None:
            pyarrow = required("pyarrow")
            self._reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.path)))
        return self._reader

    def __len__(self) -> int:
        reader = self._opened()
        last = reader.num_record_batches - 1
        return 0 if last < 0 else last * ROWS + int(reader.get_batch(last).num_rows)

    def row(self, number: int) -> dict[str, Any]:
        """The columns of one row."""
        place, offset = divmod(number, ROWS)
        if self._batch[0] != place:
            self._batch = (place, self._opened().get_batch(place))
        batch = self._batch[1]
        return {name: batch.column(name)[offset].as_py() for name in batch.schema.names}


def write_index(path: Path, batches: Iterable[Any], schema: Any) -> None:
    """Write record batches of any size as an index; the file is whole or absent."""
    ipc = required("pyarrow").ipc
    with replacing(path) as temporary, ipc.new_file(str(temporary), schema) as writer:
        for batch in _of_equal_size(batches, schema):
            writer.write_batch(batch)


def _of_equal_size(batches: Iterable[Any], schema: Any) -> Iterator[Any]:
    pyarrow = required("pyarrow")
    held = schema.empty_table()
    for batch in batches:
        held = pyarrow.concat_tables([held, pyarrow.Table.from_batches([batch], schema)])
        while len(held) >= ROWS:
            yield _one_batch(held[:ROWS])
            held = held[ROWS:]
    if len(held):
        yield _one_batch(held)


def _one_batch(table: Any) -> Any:
    return table.combine_chunks().to_batches()[0]


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
