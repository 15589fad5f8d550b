"""From a weights file to its tensors, without running code in it: safetensors, torch pickle or npz.

``timm.models.load_state_dict`` is not used: it does not say which entry of the file it took, knows no
``model_state_dict``, and in timm 1.0.15 refuses every file with the ``args`` of a training script.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from cpvit.weights.pickles import more_than_values

State: TypeAlias = dict[str, Tensor]


class CheckpointError(ValueError):
    """A weights file cannot be loaded; the message names the file, what is wrong and what to do."""


@contextmanager
def errors_naming(file: Path) -> Iterator[None]:
    """Raise every error about a file as a CheckpointError that begins with its name."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error.__cause__
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error


_HEAD_BIAS = re.compile(r"(^|[./])(head|heads\.head|fc|(cls_)?classifier)[./]bias$")


def head_classes(path: str | Path) -> int | None:
    """Classes of the classification head in a weights file; None if it has none.

    Raises:
        CheckpointError: The file cannot be read.
    """
    file = Path(path).expanduser()
    with errors_naming(file):
        _, state = read(file)
    sizes = [
        tensor.shape[0] for name, tensor in state.items() if _HEAD_BIAS.search(name) and tensor.dim() == 1
    ]
    return sizes[0] if sizes else None


_FORMAT_OF_SUFFIX: Mapping[str, str] = {
    ".safetensors": "safetensors",
    ".pth": "torch",
    ".pt": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".tar": "torch",
    ".npz": "npz",
}

# Where training scripts put the weights. Averaged (EMA) weights come first: they are the ones to evaluate.
_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")


def read(file: Path) -> tuple[str | None, State]:
    """Read a file into (entry that held the weights, its tensors)."""
    _check_is_file(file)
    expected, found = _FORMAT_OF_SUFFIX.get(file.suffix.lower()), _format_of_content(file)
    if expected is None:
        raise CheckpointError(
            f"unknown extension {file.suffix!r}; expected one of {', '.join(_FORMAT_OF_SUFFIX)}"
        )
    if found != expected:
        right = next(suffix for suffix, name in _FORMAT_OF_SUFFIX.items() if name == found)
        raise CheckpointError(
            f"the extension says {expected} but the content is {found}; rename it to *{right}"
        )
    entry, content = _unwrapped(_READERS[found](file))
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(_no_state_dict(content))
    if not content:
        raise CheckpointError("holds no tensors")
    return entry, content


def _check_is_file(file: Path) -> None:
    if file.is_dir():
        inside = sorted(child.name for child in file.iterdir() if child.suffix.lower() in _FORMAT_OF_SUFFIX)
        raise CheckpointError(f"is a folder; give the weights file in it ({some(inside) or 'it has none'})")
    if not file.exists():
        raise CheckpointError("no such file")
    if file.stat().st_size == 0:
        raise CheckpointError("the file is empty; download it again")


def _format_of_content(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(64)
    # First of all, for the length may begin with the bytes that mark the others.
    if start[8:9] == b"{":  # eight bytes of length, then a JSON header
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return _format_of_zip(file)
    if start[:1] == b"\x80":  # a pickle: how torch saved before 1.6
        return "torch"
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError("is a Git LFS pointer, not the weights; run `git lfs pull`")
    raise CheckpointError(
        f"is not a weights file (it starts with {start[:12]!r}); expected safetensors, torch or npz"
    )


def _format_of_zip(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        # ValueError: names that are no text. NotImplementedError: a version of the format that there is not.
        raise CheckpointError(f"is truncated or damaged ({_reason(error)}); download it again") from error
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    raise CheckpointError(f"is a zip archive without weights (it holds {some(names) or 'nothing'})")


def _read_safetensors(file: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(error) from error


def _read_torch(file: Path) -> object:
    with file.open("rb") as stream:
        more = more_than_values(stream)
    if more is not None:
        raise CheckpointError(f"is {more}; save its state_dict() as safetensors")
    try:
        # torch warns about rare pickle protocols; what it cannot read is refused below.
        with warnings.catch_warnings(), _namespaces_allowed():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None:
            raise CheckpointError(
                f"is damaged, or not written by torch.save ({_reason(error)}); nothing in it was run"
            ) from None
        raise CheckpointError(
            f"needs arbitrary unpickling (it contains {name[1]}), which can run code, and was not read; "
            "save its state_dict() as safetensors on a machine that trusts it"
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _damaged(error) from error


def _namespaces_allowed() -> AbstractContextManager[object]:
    """Let training scripts' ``args`` pass: a Namespace only holds values, building one runs no code."""
    # torch 2.4 cannot allow a class for one call only; there such files are refused.
    allowed = getattr(torch.serialization, "safe_globals", None)
    return nullcontext() if allowed is None else allowed([argparse.Namespace])


def _read_npz(file: Path) -> object:
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as archive:
            return {key: torch.from_numpy(archive[key]) for key in archive.files}
    except Exception as error:  # zlib, zip, header and dtype errors all differ
        raise _damaged(error) from error


_READERS: Mapping[str, Callable[[Path], object]] = {
    "safetensors": _read_safetensors,
    "torch": _read_torch,
    "npz": _read_npz,
}


def _damaged(error: Exception) -> CheckpointError:
    return CheckpointError(f"is truncated, damaged or not supported ({_reason(error)}); download it again")


_LONGEST_REASON = 200
"""Letters: a damaged zip is reported with whole pieces of its content."""


def _reason(error: Exception) -> str:
    """The first sentence of the message; torch's run to paragraphs."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    sentence = text.splitlines()[0].split(". ")[0]
    return sentence if len(sentence) <= _LONGEST_REASON else f"{sentence[:_LONGEST_REASON]}..."


def _unwrapped(content: object) -> tuple[str | None, dict[str, Tensor]]:
    """Find the state dict in what was read. Its values are checked by the caller."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"holds a {type(content).__name__}; expected a dict of tensors (a state_dict)")
    for entry in _ENTRIES:
        if isinstance(content.get(entry), Mapping):
            return entry, dict(content[entry])
    return None, dict(content)


def _no_state_dict(content: Mapping[str, object]) -> str:
    others = [
        f"{key} ({type(value).__name__})" for key, value in content.items() if not isinstance(value, Tensor)
    ]
    return f"holds no state_dict but {some(others)}; expected tensors, or an entry {' or '.join(_ENTRIES)}"


def some(names: Iterable[str], limit: int = 3) -> str:
    listed = [str(name) for name in names]
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
