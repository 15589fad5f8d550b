"""A tiny model, a few dozen generated images in every kind of source, and command lines over them."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from conftest import add_member, randomize_
from PIL import Image
from safetensors.torch import save_file

from cpvit.commands.cli import main

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COUNT, SIDE, CLASSES = 30, 64, 7
BAD = 17
"""Number of the image that is none, where there is one."""


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (70, 66, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def name_of(number: int) -> str:
    return f"{number // 10:02}/{number:04}.png"


def write_folder(root: Path, count: int, *, bad: bool = False) -> Path:
    for number in range(count):
        path = root / name_of(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image" if bad and number == BAD else picture(number))
    return root


def write_tar(path: Path, count: int, *, first: int = 0, labels: bool = False) -> Path:
    with tarfile.open(path, "w") as archive:
        for number in range(first, first + count):
            add_member(archive, name_of(number) if not labels else f"{number:04}.png", picture(number))
            if labels:
                add_member(archive, f"{number:04}.cls", b"1")
    return path


def write_shards(folder: Path, count: int, shards: int) -> str:
    folder.mkdir(parents=True)
    for shard in range(shards):
        first, last = (count * n // shards for n in (shard, shard + 1))
        write_tar(folder / f"{shard:06}.tar", last - first, first=first, labels=True)
    return f"{folder}/{{000000..{shards - 1:06}}}.tar"


def write_list(path: Path, names: Sequence[str]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"path": list(names), "other": list(range(len(names)))}), path)
        return path
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerows([["other", "path"], *([number, name] for number, name in enumerate(names))])
    return path


def write_weights(path: Path) -> Path:
    model = timm.create_model("test_vit", num_classes=CLASSES, img_size=SIDE)
    randomize_(model, 0)
    save_file(model.state_dict(), path)
    return path


def asked(verb: str, weights: Path, data: Path | str, out: Path, *more: str) -> list[str]:
    model = [
        "--model",
        "test_vit",
        "--image-size",
        str(SIDE),
        "--device",
        "cpu",
        "--checkpoint",
        str(weights),
    ]
    size = [] if "--batch-size" in more else ["--batch-size", "4"]
    rows = [] if "--rows-per-part" in more else ["--rows-per-part", "8"]
    return [verb, *model, "--data", str(data), "--out", str(out), *size, *rows, *more]


def ran(verb: str, weights: Path, data: Path | str, out: Path, *more: str) -> Any:
    """The whole output as a table, in the order of the files."""
    assert main(asked(verb, weights, data, out, *more)) == 0
    return whole(out)


def whole(out: Path) -> Any:
    return pa.concat_tables(pq.read_table(path, partitioning=None) for path in parts(out))


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def contents(out: Path) -> dict[str, bytes]:
    """Every file that a reader would take for output."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "_run.json"}
