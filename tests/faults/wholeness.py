"""Which files of a folder are whole, and what in them must be the same in two runs."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

from cpvit.bulk.requirements import required
from cpvit.finetune.checkpoint import TrainingState, load_state
from cpvit.finetune.history import COLUMNS

VOLATILE = {"made_by", "seconds", "images_per_s", "environment", "resumed_at", "stages", "out", "path"}
"""Keys of records whose values say when, where and how fast."""
ROUNDED = {"max_difference", "typical_difference", "kl", "distance"}
"""Keys of an export's parity that say how both sides rounded: where memory is short, matrices are multiplied in another
way. The graph itself is compared to the last bit."""
CHECKPOINT = "checkpoint.safetensors"


def files(folder: Path) -> list[Path]:
    """Those that a reader would take for a result: names that begin with a dot are drafts."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not hidden(path.relative_to(folder)))


def hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def broken(folder: Path) -> list[str]:
    """Results of which there is only a part."""
    return [f"{path.relative_to(folder)}: {why}" for path in files(folder) if (why := _why_broken(path))]


def _why_broken(path: Path) -> str:
    try:
        _read(path)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _read(path: Path) -> object:
    """Read a file to its end; any error means that it is not whole."""
    if path.suffix in (".json", ".search"):
        return json.loads(path.read_text())
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 -- not a dict
    if path.suffix == ".parquet":
        return required("pyarrow.parquet").read_table(path, partitioning=None)
    if path.suffix == ".arrow":
        return required("pyarrow").ipc.open_file(path).read_all()
    if path.suffix == ".onnx":
        return required("onnx").checker.check_model(required("onnx").load(path), full_check=True)
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return picture.load()
    if path.suffix == ".html":
        return _ends_with(path, "</html>")
    if path.suffix == ".md":
        return _ends_with(path, "\n")
    raise AssertionError(f"nobody knows when a file like {path.name} is whole")


def _ends_with(path: Path, last: str) -> str:
    text = path.read_text()
    if not text.rstrip(" ").endswith(last) and not text.rstrip().endswith(last):
        raise ValueError(f"does not end in {last!r}")
    return text


def products(folder: Path) -> dict[str, Any]:
    """What must be the same in two runs, by the name of the file."""
    return {str(path.relative_to(folder)): _product(path) for path in files(folder)}


def _product(path: Path) -> object:
    if path.name == CHECKPOINT:
        return _state(load_state(path))
    if path.suffix == ".json":
        return lasting(json.loads(path.read_text()))
    if path.suffix == ".safetensors":  # whose metadata stands in any order
        with safe_open(path, framework="pt") as opened:
            tensors = _tensors({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
            return {"metadata": opened.metadata(), "tensors": tensors}
    if path.suffix == ".html":  # holds the hour, and speeds
        return "a page"
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            return {name: _digest(archive.read(name)) for name in archive.namelist()}
    return _digest(path.read_bytes())


def _state(state: TrainingState) -> dict[str, Any]:
    """Of a run of finetuning: everything but the speeds."""
    lasting_columns = [number for number, name in enumerate(COLUMNS) if name != "images_per_s"]
    return {
        "step": state.step,
        "fingerprint": state.fingerprint,
        "plan": state.plan,
        "model": _tensors(state.model),
        "ema": _tensors(state.ema or {}),
        "optimizer": {number: _tensors(part) for number, part in state.optimizer.items()},
        "history": state.history[:, lasting_columns].tolist(),
        "evaluations": [str(evaluation) for evaluation in state.evaluations],
    }


def _tensors(values: dict[str, Any]) -> dict[str, object]:
    return {
        name: _digest(value.contiguous().view(torch.uint8).numpy().tobytes())
        if isinstance(value, torch.Tensor) and value.dim()
        else str(value)
        for name, value in values.items()
    }


def lasting(values: Any) -> Any:
    """A record without what depends on the hour and the machine."""
    if isinstance(values, dict):
        dropped = VOLATILE | ROUNDED if "most_kl" in values else VOLATILE
        return {key: lasting(value) for key, value in values.items() if key not in dropped}
    return [lasting(value) for value in values] if isinstance(values, list) else values


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the files in which two runs differ."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
