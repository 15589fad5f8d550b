"""CIFAR-10 and CIFAR-100 by name, in torchvision's layout or as class folders.

torchvision's files are pickles. They are read by torchvision's own reader only, which compares each with its
known checksum before unpickling, so nothing but the published files is ever loaded.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cpvit.data.archives import find_in_archive
from cpvit.data.folders import find_in_folder
from cpvit.data.layout import check_split
from cpvit.data.records import ImageSource, make_source

_BATCHES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True)
class ArrayReader:
    """Images held in memory as `[height width 3]` arrays of bytes."""

    arrays: Mapping[str, npt.NDArray[np.uint8]]

    def read(self, key: str) -> Image.Image:
        """The RGB image stored under `key`."""
        return Image.fromarray(self.arrays[key])

    def select(self, keys: Iterable[str]) -> ArrayReader:
        """A reader with the arrays of `keys` only."""
        return ArrayReader({key: self.arrays[key] for key in keys})


def default_data_dir() -> Path:
    """Where named datasets are kept if the user gives no folder."""
    return Path.home() / ".cache" / "cpvit"


def is_cifar(source: str) -> bool:
    """Whether `source` names a CIFAR dataset."""
    return source.lower() in _BATCHES


def torchvision_cifar(folder: Path) -> str | None:
    """The name of the CIFAR dataset that `folder` is or holds in torchvision's layout, if any."""
    for name, batches in _BATCHES.items():
        if folder.name == batches or (folder / batches).is_dir():
            return name
    return None


def find_cifar(name: str, split: str | None, data_dir: Path | None, *, download: bool) -> ImageSource:
    """A CIFAR dataset from `data_dir` if it is there, else downloaded if that is allowed."""
    name = name.lower()
    check_split(split)
    root = data_dir or default_data_dir()
    if root.name == _BATCHES[name]:
        root = root.parent
    if (root / _BATCHES[name]).is_dir():
        return _read_torchvision(name, root, split, download=download)
    if root.is_file():
        return _checked(name, find_in_archive(root, split), root)
    for folder in (root, root / name):
        if (folder / "train").is_dir() or (folder / "test").is_dir():
            return _checked(name, find_in_folder(folder, split), folder)
    if download:
        return _read_torchvision(name, root, split, download=True)
    raise FileNotFoundError(
        f"no {name} in {root}; fetch it with --download (download=True), or give with --data-dir "
        f"(data_dir=...) a folder that holds {_BATCHES[name]}/ or class folders in train/ and test/"
    )


def _checked(name: str, source: ImageSource, where: Path) -> ImageSource:
    """Refuse class folders of another dataset: their sorted order would give plausible but wrong labels."""
    right = source.classes == CIFAR10_CLASSES if name == "cifar10" else len(source.classes) == 100
    if not right:
        expected = ", ".join(CIFAR10_CLASSES) if name == "cifar10" else "100 class folders"
        got = f"{len(source.classes)} classes ({', '.join(source.classes[:5])}, ...)"
        raise ValueError(
            f"{where} is not {name}: expected {expected}, got {got}; give the folder itself as the data"
        )
    return source


def _read_torchvision(name: str, root: Path, split: str | None, *, download: bool) -> ImageSource:
    """All images of one split. CIFAR has train and test only, so both held-out splits mean test."""
    chosen = "train" if split == "train" else "test"
    dataset = _open_torchvision(name, root, train=chosen == "train", download=download)
    keys = [f"{chosen}/{index:05d}" for index in range(len(dataset.data))]
    classes = [dataset.classes[target] for target in dataset.targets]
    if list(dataset.classes) != sorted(dataset.classes):
        raise ValueError(
            f"{name} in {root}: class names are not in alphabetical order, so labels would be wrong"
        )
    reader = ArrayReader(dict(zip(keys, dataset.data, strict=True)))
    source = make_source(name, keys, classes, reader, split=chosen)
    return replace(source, classes=tuple(dataset.classes))


def _open_torchvision(name: str, root: Path, *, train: bool, download: bool) -> Any:
    from torchvision import datasets

    dataset_class = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    # Progress of a download goes to stderr: stdout belongs to results.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        # Recent numpy versions warn about how these old pickles were written.
        warnings.simplefilter("ignore")
        try:
            return dataset_class(str(root), train=train, download=download)
        except OSError as error:
            raise OSError(f"cannot download {name} to {root}: {error}") from error
        except RuntimeError as error:
            raise ValueError(
                f"{root / _BATCHES[name]} is incomplete or damaged (checksums differ); "
                "remove it and fetch it again with --download (download=True)"
            ) from error
