"""From what a user names (a dataset, a folder, an archive, shards) to a list of samples."""

from __future__ import annotations

import os
from pathlib import Path

from cpvit.data.archives import find_in_archive
from cpvit.data.cifar import find_cifar, is_cifar, torchvision_cifar
from cpvit.data.folders import find_in_folder
from cpvit.data.layout import check_split
from cpvit.data.records import ImageSource
from cpvit.data.shards import is_shards, open_shards


def find_samples(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> ImageSource:
    """List the images of `source` with their classes; no image is decoded yet.

    Kinds of source:
        `cifar10`, `cifar100`: the dataset in `data_dir` (default `~/.cache/cpvit`), as torchvision stores it
            or as class folders in train/ and test/; fetched by torchvision with `download=True`. The name
            wins over a folder of the same name, which is reached as `./cifar10`.
        A folder: `<class>/<image>`; or train/ and val/ or test/ with class folders in them; or just images
            (for use without labels). The first folder is the class and may hold further folders.
        A tar archive (plain, gzip, bzip2 or xz), read without unpacking, of the same. The folder that holds
            an image is its class, whatever lies above.
        Shards in WebDataset's format, see `open_shards`: a pattern with braces, such as
            `data/train-{000000..000012}.tar`; a folder that holds nothing but .tar files; train/ and val/ folders
            of .tar files. Their classes are the labels in them.
    In folders and archives, folders that only wrap the data are passed over, and if every image lies under a
    WordNet id that is its class. Hidden files, text files (`.txt`, ...) and what macOS and Windows leave behind are
    ignored. Any other file counts as an image, so that a broken one is noticed.

    Args:
        source: Name or path.
        split: `"test"` takes test/ or, if missing, val/ (validation/, valid/); `"val"` the other way round;
            `"train"` train/ only; None means held-out data, as `"test"`. If class folders lie directly in the
            source, then the source is itself one split and the argument changes nothing: `split_name` of the
            result is None.
        data_dir: Where a named dataset lies or goes.
        download: Whether a named dataset may be fetched.

    Raises:
        FileNotFoundError: Nothing there.
        BadArchiveError: The archive or a shard is truncated, damaged or no archive (a ValueError).
        ValueError: No images, or not the split that was asked for.

    Example:
        >>> find_samples("imagenet-val.tar").limited(1000)  # doctest: +SKIP
    """
    check_split(split)
    if isinstance(source, str) and is_cifar(source):
        return find_cifar(source, split, None if data_dir is None else Path(data_dir), download=download)
    path = Path(source)
    if data_dir is not None or download:
        raise ValueError(
            "data_dir and download (--data-dir, --download) are for cifar10 and cifar100, "
            f"but the source is {path}"
        )
    if is_shards(path):
        return open_shards(path, split=split)
    if path.is_file():
        return find_in_archive(path, split)
    if not path.exists():
        raise FileNotFoundError(
            f"no such file or folder: {path}; give cifar10, cifar100, a folder of images or a tar of one"
        )
    _refuse_torchvision_cifar(path)
    return find_in_folder(path, split)


open_data = find_samples
"""The name that opened shards when `find_samples` did not."""


def _refuse_torchvision_cifar(folder: Path) -> None:
    """Its files carry no image extension, so they would be taken for broken images."""
    name = torchvision_cifar(folder)
    if name is not None:
        raise ValueError(
            f"{folder} is torchvision's copy of {name}; use {name} with --data-dir {folder} (data_dir=...)"
        )
