"""The same images from every kind of source: the same values, in the order of the source."""

from __future__ import annotations

import os
import pickle
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from bulk_runs import (
    COUNT,
    name_of,
    pa,
    parts,
    picture,
    pq,
    ran,
    write_folder,
    write_list,
    write_shards,
    write_tar,
    write_weights,
)

from cpvit.bulk.index import ROWS, Index, write_index
from cpvit.bulk.listing import list_source, open_listed
from cpvit.commands.cli import main

KINDS = ("folder", "tar", "shards", "shard folder", "parquet", "csv", "dataset")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "folder", COUNT)


@pytest.fixture(scope="module")
def sources(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("sources")
    names = [name_of(number) for number in range(COUNT)]
    found = {
        "folder": str(folder),
        "tar": str(write_tar(root / "images.tar", COUNT)),
        "shards": write_shards(root / "shards", COUNT, 4),
        "shard folder": str(root / "shards"),
        "parquet": str(write_list(root / "list.parquet", [str(folder / name) for name in names])),
        "csv": str(write_list(folder.parent / "list.csv", [f"folder/{name}" for name in names])),
        "dataset": str(root / "dataset"),
    }
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": picture(number), "path": None} for number in range(COUNT)]
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"photo": images, "label": [0] * COUNT}, features=features)
    table.save_to_disk(found["dataset"])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_every_kind_of_source_gives_the_same(
    sources: dict[str, str], weights: Path, folder: Path, tmp_path: Path, kind: str
) -> None:
    expected = ran("predict", weights, folder, tmp_path / "expected", "--macs", "0.7")
    workers = ["--workers", "1"] if kind in ("csv", "dataset", "shards") else []
    found = ran("predict", weights, sources[kind], tmp_path / "found", "--macs", "0.7", *workers)
    for column in ("row", "classes", "probabilities", "error"):
        assert found[column].equals(expected[column])
    keys = {
        "folder": name_of(COUNT - 1),
        "tar": name_of(COUNT - 1),
        "shards": f"000003.tar:{COUNT - 1:04}.png",
        "shard folder": f"000003.tar:{COUNT - 1:04}.png",
        "parquet": str(folder / name_of(COUNT - 1)),
        "csv": f"folder/{name_of(COUNT - 1)}",
        "dataset": str(COUNT - 1),
    }
    assert found["key"][COUNT - 1].as_py() == keys[kind]
    assert len(parts(tmp_path / "found")) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_opens_what_was_listed(sources: dict[str, str], tmp_path: Path, kind: str) -> None:
    index = tmp_path / "index.arrow"
    listed = list_source(sources[kind], index)
    opened = pickle.loads(pickle.dumps(open_listed(sources[kind], index)))
    assert (len(opened), opened.fingerprint) == (COUNT, listed.fingerprint)
    for row in (0, 7, COUNT - 1):
        assert opened.key(row) == listed.key(row)
        assert opened.read(row) == picture(row)


def test_paths_are_ordered_by_their_bytes_and_junk_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("b/2.png", "b/10.png", "a.png", "B.png", "é.png", ".hidden", "notes.txt", ".git/x.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "b" / "circle").symlink_to(root)
    source = list_source(str(root), tmp_path / "index.arrow")
    assert [source.key(row) for row in range(len(source))] == [
        "B.png",
        "a.png",
        "b/10.png",
        "b/2.png",
        "é.png",
    ]


def test_an_index_of_several_batches_finds_each_row(tmp_path: Path) -> None:
    count = 2 * ROWS + 5
    schema = pa.schema([("key", pa.large_string()), ("place", pa.int64())])
    sizes = [1, ROWS, 3, 0, count - ROWS - 4]
    starts = np.cumsum([0, *sizes])
    batches = [
        pa.record_batch([[str(n) for n in range(a, a + size)], list(range(a, a + size))], schema=schema)
        for a, size in zip(starts, sizes, strict=False)
    ]
    write_index(tmp_path / "index.arrow", batches, schema)
    index = Index(tmp_path / "index.arrow")
    assert len(index) == count
    for row in (0, 1, ROWS - 1, ROWS, 2 * ROWS, count - 1):
        assert index.row(row) == {"key": str(row), "place": row}


def test_a_million_paths_take_no_python_objects(tmp_path: Path) -> None:
    """As strings they would take 80 MB."""
    count = 1_000_000
    names = pa.array(np.char.mod("folder/%012d.jpg", np.arange(count)))
    pq.write_table(pa.table({"path": names}), tmp_path / "list.parquet")
    tracemalloc.start()
    try:
        source = list_source(str(tmp_path / "list.parquet"), tmp_path / "index.arrow")
        assert len(source) == count
        for row in range(0, count, 10_000):
            assert source.key(row) == f"folder/{row:012}.jpg"
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: root / "missing", "no such file or folder"),
        (
            lambda root: (root / "empty").mkdir() or root / "empty",
            "no images in",
        ),
        (lambda root: write_list(root / "x.csv", []), "no images in"),
        (lambda root: _compressed(root), "decompress it to a plain .tar"),
        (lambda root: _splits(root), "name the folder (the split) that holds them"),
    ],
)
def test_what_cannot_be_listed_is_named(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object, says: str
) -> None:
    data = make(tmp_path)  # type: ignore[operator]
    line = ["predict", "--model", "test_vit", "--image-size", "64", "--checkpoint", str(weights)]
    assert main([*line, "--data", str(data), "--out", str(tmp_path / "out"), "--dense"]) == 1
    assert says in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("part-*"))


def _compressed(root: Path) -> Path:
    with tarfile.open(root / "x.tar.gz", "w:gz"):
        pass
    return root / "x.tar.gz"


def _splits(root: Path) -> Path:
    for split in ("train", "val"):
        (root / "set" / split).mkdir(parents=True)
        write_tar(root / "set" / split / "0.tar", 1, labels=True)
    return root / "set"


@pytest.mark.parametrize(
    ("columns", "extra", "says"),
    [
        ({"file": ["a"], "other": ["b"]}, [], "has no column 'path' but 'file', 'other'; say which"),
        ({"file": ["a"]}, ["--column", "image"], "has no column 'image' but 'file'"),
        ({"path": ["a", None]}, [], "has empty entries; expected a path in every row"),
    ],
)
def test_a_list_without_paths(
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    columns: dict[str, list[str | None]],
    extra: list[str],
    says: str,
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    line = ["predict", "--model", "test_vit", "--image-size", "64", "--checkpoint", str(weights), "--dense"]
    line += ["--data", str(tmp_path / "list.parquet"), "--out", str(tmp_path / "out")]
    assert main([*line, *extra]) == 1
    assert says in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_command(
    weights: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = ["predict", "--model", "test_vit", "--image-size", "64", "--checkpoint", str(weights), "--dense"]
    line += ["--data", str(folder), "--out", str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*line, "--engine", "ray"]) == 1
    assert "pip install 'cpvit[ray]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(line) == 1
    assert "pip install 'cpvit[bulk]'" in capsys.readouterr().err
    assert not os.listdir(tmp_path)  # noqa: PTH208
