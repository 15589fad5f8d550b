"""What a run goes through: a folder, a tar, shards, a file of paths, or a Hugging Face data set. One row per image.

Rows have a stated order: paths below a folder by their bytes, members of a tar and of shards as they are stored, lists
and data sets as they are. An image is found by its row; its key says what it is called.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cpvit.bulk.index import ROWS, Index, file_digest, write_index
from cpvit.bulk.requirements import required
from cpvit.bulk.sources import DatasetSource, FilesSource, MembersSource, Source, load_dataset
from cpvit.data.archives import errors_named, is_compressed, member_key, stored_files
from cpvit.data.layout import is_junk_file, is_junk_folder
from cpvit.data.shard_files import walk_samples
from cpvit.data.shards import is_shards, shard_files

LISTS = (".parquet", ".csv")


def is_dataset(path: Path) -> bool:
    """Whether ``datasets`` wrote the folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def list_source(data: str, index: Path, *, column: str | None = None) -> Source:
    """List what ``data`` names into the file ``index``, and open it.

    Args:
        data: A folder, a plain tar, shards (a folder of .tar files alone, or a pattern with braces), a .parquet or .csv
            file of paths, or a folder of ``datasets``.
        index: Where to write the list; not needed for ``datasets``.
        column: Of a file of paths (default "path") or of a data set (default: its only image column).

    Raises:
        FileNotFoundError: Nothing there.
        BadArchiveError: A tar is damaged.
        MissingPackageError: A package is not installed.
        ValueError: No images, or something that cannot be read in place.
    """
    path = Path(data).expanduser()
    if is_dataset(path):
        return _open_dataset(path, column)
    if column is not None and path.suffix.lower() not in LISTS:
        raise ValueError(
            f"--column is for a .parquet or .csv file of paths or a data set, and not for {path}"
        )
    if is_shards(path):
        return _list_members(shard_files(path), index, shards=True)
    if not path.exists():
        raise FileNotFoundError(
            f"no such file or folder: {path}; give a folder of images, a .tar, shards (train-{{000000..000012}}.tar), "
            "a .parquet or .csv file of paths, or a folder that datasets.save_to_disk wrote"
        )
    if path.is_dir():
        return _list_files(path, index, _sorted_paths(path))
    if path.suffix.lower() in LISTS:
        return _list_files(path.parent, index, _listed_paths(path, column))
    return _list_members([path], index, shards=False)


def open_listed(data: str, index: Path, *, column: str | None = None) -> Source:
    """Open what another process has listed with :func:`list_source`, without listing it again."""
    path = Path(data).expanduser()
    if is_dataset(path):
        return _open_dataset(path, column)
    digest = file_digest(index)
    if is_shards(path):
        return MembersSource(tuple(shard_files(path)), Index(index), digest)
    if path.is_dir():
        return FilesSource(path, Index(index), digest)
    if path.suffix.lower() in LISTS:
        return FilesSource(path.parent, Index(index), digest)
    return MembersSource((path,), Index(index), digest)


def _list_files(root: Path, index: Path, paths: Iterable[Any]) -> FilesSource:
    pyarrow = required("pyarrow")
    schema = pyarrow.schema([("key", pyarrow.large_string())])
    write_index(index, (pyarrow.record_batch([_large(names)], schema=schema) for names in paths), schema)
    return FilesSource(root, _not_empty(Index(index), root), file_digest(index))


def _large(names: Any) -> Any:
    pyarrow = required("pyarrow")
    whole = names.combine_chunks() if isinstance(names, pyarrow.ChunkedArray) else names
    return whole.cast(pyarrow.large_string())


def _not_empty(index: Index, where: object) -> Index:
    if not len(index):
        raise ValueError(f"no images in {where}")
    return index


def _sorted_paths(root: Path) -> Iterator[Any]:
    """Paths of all files below ``root``, in the order of their bytes, as arrays."""
    pyarrow, compute = required("pyarrow"), required("pyarrow.compute")
    arrays = [pyarrow.array([], pyarrow.large_string())]
    held: list[str] = []
    for name in _walk(root):
        held.append(name)
        if len(held) == ROWS:
            arrays.append(_text(held, root))
            held = []
    names = pyarrow.concat_arrays([*arrays, _text(held, root)])
    order = compute.sort_indices(names)
    for start in range(0, len(order), ROWS):
        yield names.take(order[start : start + ROWS])


def _text(names: Sequence[str], root: Path) -> Any:
    pyarrow = required("pyarrow")
    try:
        return pyarrow.array(names, pyarrow.large_string())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a file below {root} has a name that is not UTF-8: {error.object!r}; rename it"
        ) from None


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of all files that are not junk; links are followed, but not in circles."""
    seen: set[str] = set()
    folders = [""]
    while folders:
        prefix = folders.pop()
        real = os.path.realpath(root / prefix)
        if real in seen:
            continue
        seen.add(real)
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders += [] if is_junk_folder(entry.name) else [f"{prefix}{entry.name}/"]
                elif not is_junk_file(entry.name):
                    yield prefix + entry.name


def _listed_paths(path: Path, column: str | None) -> Iterator[Any]:
    """The column of paths in a .parquet or .csv file, piece by piece."""
    if path.suffix.lower() == ".parquet":
        file = required("pyarrow.parquet").ParquetFile(path)
        name = _path_column(file.schema_arrow.names, column, path)
        batches = file.iter_batches(batch_size=ROWS, columns=[name])
    else:
        csv, pyarrow = required("pyarrow.csv"), required("pyarrow")
        with path.open("rb") as stream:
            header = csv.open_csv(stream).schema.names
        name = _path_column(header, column, path)
        convert = csv.ConvertOptions(include_columns=[name], column_types={name: pyarrow.string()})
        batches = csv.open_csv(path, convert_options=convert)
    for batch in batches:
        if batch.column(0).null_count:
            raise ValueError(f"column {name!r} of {path} has empty entries; expected a path in every row")
        yield batch.column(0)


def _path_column(names: Sequence[str], column: str | None, path: Path) -> str:
    wanted = column or ("path" if len(names) > 1 or "path" in names else names[0])
    if column is None and "path" not in names:
        raise ValueError(
            f"{path} has no column 'path' but {', '.join(map(repr, names))}; say which holds the paths (--column)"
        )
    if wanted not in names:
        raise ValueError(f"{path} has no column {wanted!r} but {', '.join(map(repr, names))}")
    return wanted


def _list_members(archives: Sequence[Path], index: Path, *, shards: bool) -> MembersSource:
    pyarrow = required("pyarrow")
    schema = pyarrow.schema(
        [
            ("key", pyarrow.large_string()),
            ("archive", pyarrow.int32()),
            ("offset", pyarrow.int64()),
            ("length", pyarrow.int64()),
        ]
    )
    common = os.path.commonpath([path.parent for path in archives]) if shards else ""
    members = (
        pyarrow.record_batch([list(column) for column in zip(*found, strict=True)], schema=schema)
        for number, archive in enumerate(archives)
        for found in _pieces(_members(archive, number, common, shards=shards))
    )
    write_index(index, members, schema)
    where = archives[0] if len(archives) == 1 else f"the {len(archives)} shards of {common or '.'}"
    return MembersSource(tuple(archives), _not_empty(Index(index), where), file_digest(index))


_Member = tuple[str, int, int, int]


def _pieces(members: Iterator[_Member]) -> Iterator[list[_Member]]:
    held: list[_Member] = []
    for member in members:
        held.append(member)
        if len(held) == ROWS:
            yield held
            held = []
    if held:
        yield held


def _members(archive: Path, number: int, common: str, *, shards: bool) -> Iterator[_Member]:
    """Key, number of the archive, offset and length of its images."""
    if is_compressed(archive):
        raise ValueError(
            f"{archive} is compressed, but images are read in place; decompress it to a plain .tar"
        )
    with errors_named(archive), archive.open("rb") as stream:
        if shards:
            name = os.path.relpath(archive, common or ".")
            for files in walk_samples(stream, archive):
                yield f"{name}:{_utf8(files.image[0])}", number, *files.image[1]
            return
        for stored, extent in stored_files(stream):
            key = member_key(stored)
            if key is not None:
                yield _utf8(key), number, *extent


def _utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise tarfile.ReadError(f"{name!r} is not UTF-8") from None
    return name


def _open_dataset(folder: Path, column: str | None) -> DatasetSource:
    dataset = load_dataset(folder)
    kind = required("datasets").Image
    images = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if column is None and len(images) != 1:
        raise ValueError(
            f"{folder} has {len(images)} image columns among {', '.join(dataset.features)}; say which (--column)"
        )
    wanted = column or images[0]
    if wanted not in images:
        raise ValueError(f"{folder} has no image column {wanted!r} but {', '.join(images) or 'none'}")
    if not len(dataset):
        raise ValueError(f"no images in {folder}")
    return DatasetSource(folder, wanted, str(dataset._fingerprint), len(dataset))
