"""Files that ``torch.load`` of torch 2.5 runs or unpacks in spite of ``weights_only`` (CVE-2025-32434)."""

from __future__ import annotations

import tarfile
from contextlib import suppress
from typing import BinaryIO

import torch

ZIP = b"PK\x03\x04"


def more_than_values(stream: BinaryIO) -> str | None:
    """What a file is besides pickled values, as torch would take it; None if nothing. The stream is left at its start.

    torch 2.6 and newer refuse both themselves. The archive is listed by torch's own reader: another one could be shown
    another list of what is in the same bytes.
    """
    start = stream.read(len(ZIP))
    stream.seek(0)
    try:
        return _of_zip(stream) if start == ZIP else _of_others(stream)
    finally:
        stream.seek(0)


def _of_zip(stream: BinaryIO) -> str | None:
    with suppress(RuntimeError):  # damaged: torch.load will say so
        if "constants.pkl" in torch._C.PyTorchFileReader(stream).get_all_records():
            return "a TorchScript program, which holds code"
    return None


def _of_others(stream: BinaryIO) -> str | None:
    with suppress(tarfile.TarError, ValueError, OSError), tarfile.open(fileobj=stream, mode="r:"):
        return "a tar archive, which torch would unpack (the format of its first versions)"
    return None
