"""Open an exported file and run it in its own runtime, on the CPU."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.torch_version import TorchVersion

from cpvit.export.description import INPUT, KEY, SUFFIXES, Description, ExportError, Format
from cpvit.export.openvino_files import last_line, read_openvino
from cpvit.export.program import to_uint8
from cpvit.export.requirements import required
from cpvit.weights.pickles import more_than_values

WEIGHTS_ONLY_IS_ENOUGH = torch.__version__ >= TorchVersion("2.6")
"""Before that torch.load runs TorchScript and unpacks archives in spite of it (:mod:`cpvit.weights.pickles`)."""

Run: TypeAlias = Callable[[NDArray[Any]], NDArray[numpy.float32]]


@dataclass(frozen=True)
class ExportedModel:
    """An exported file, opened."""

    path: Path
    description: Description
    run: Run
    """The graph's input, as described -> [B K]."""

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images [B 3 H W] -> logits [B K], whatever the graph's own input is.

        Raises:
            ExportError: Another shape than the file takes.
        """
        return torch.from_numpy(self.run(self.as_input(images)))

    def as_input(self, images: Tensor) -> NDArray[Any]:
        """Normalised images [B 3 H W] as the graph's input."""
        self._check(images)
        described = self.description
        if not described.normalized_inside:
            return images.float().contiguous().numpy()
        assert described.preprocessing is not None
        return to_uint8(images, described.preprocessing).numpy()

    def _check(self, images: Tensor) -> None:
        described = self.description
        expected = (3, *described.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ExportError(f"{self.path} takes images of {expected}, got {tuple(images.shape[1:])}")
        if described.batch_size not in (None, len(images)):
            raise ExportError(
                f"{self.path} takes {described.batch_size} images at once, got {len(images)}; give batches of that "
                "size, or export without --batch-size"
            )


def open_exported(path: str | Path, *, threads: int | None = None, bfloat16: bool = False) -> ExportedModel:
    """Open a file that :func:`cpvit.export.export` wrote.

    Args:
        path: ``.onnx``, ``.xml`` (with its ``.bin`` beside it) or ``.pt2``.
        threads: CPU threads; default: as many as torch uses.
        bfloat16: Let OpenVINO compute in bfloat16, where the processor can; otherwise it computes in float32.

    Raises:
        ExportError: Damaged, not an exported file, or its runtime is not installed.

    Example:
        >>> model = open_exported("deit.onnx")  # doctest: +SKIP
        >>> logits = model(images)  # doctest: +SKIP
    """
    path = Path(path)
    kind = _kind(path)
    threads = torch.get_num_threads() if threads is None else threads
    if not path.is_file():
        raise ExportError(f"{path} is not a file")
    if kind == "onnx":
        text, run = _open_onnx(path, threads)
    elif kind == "openvino":
        text, run = _open_openvino(path, threads, bfloat16)
    else:
        text, run = _open_torch(path)
    return ExportedModel(path, _described(path, text), run)


def _kind(path: Path) -> Format:
    for kind, suffix in SUFFIXES.items():
        if path.suffix == suffix:
            return kind
    raise ExportError(f"{path} is no exported file: expected one of {', '.join(SUFFIXES.values())}")


def _described(path: Path, text: str | None) -> Description:
    if not text:
        raise ExportError(
            f"{path} was not written by cpvit export: its metadata has no {KEY!r}, so nothing says what it expects"
        )
    try:
        return Description.from_json(text)
    except (ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ExportError(f"{path}: its description cannot be read: {error}") from error


def _open_onnx(path: Path, threads: int) -> tuple[str | None, Run]:
    onnxruntime = required("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it raises it need not print as well
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exceptions have no common base
        raise ExportError(f"ONNX Runtime cannot read {path}: {last_line(error)}") from error
    text = session.get_modelmeta().custom_metadata_map.get(KEY)

    def run(images: NDArray[Any]) -> NDArray[numpy.float32]:
        found: NDArray[numpy.float32] = session.run(None, {INPUT: images})[0]
        return found

    return text, run


def _open_openvino(path: Path, threads: int, bfloat16: bool) -> tuple[str | None, Run]:
    openvino = required("openvino")
    model = read_openvino(path)
    text = None
    with contextlib.suppress(RuntimeError, UnicodeDecodeError):
        text = model.get_rt_info([KEY]).astype(str)
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    try:
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ExportError(f"OpenVINO cannot compile {path}: {last_line(error)}") from error

    def run(images: NDArray[Any]) -> NDArray[numpy.float32]:
        found: NDArray[numpy.float32] = request.infer([images])[0].copy()
        return found

    return text, run


@contextlib.contextmanager
def _nothing_but_tensors() -> Iterator[None]:
    """torch's reader unpickles parts of a program without restriction; this variable forbids what could run code."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _no_traceback() -> Iterator[None]:
    """torch logs the whole traceback of a file that it cannot read, and then raises all the same."""
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _refuse_code(path: Path) -> None:
    """What torch 2.5 would not."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            more = more_than_values(io.BytesIO(archive.read(name)))
            if more is not None:
                raise ValueError(f"{name} in it is {more}")


def _open_torch(path: Path) -> tuple[str | None, Run]:
    files = {KEY: ""}
    try:
        with warnings.catch_warnings(), _nothing_but_tensors(), _no_traceback():
            warnings.simplefilter("ignore")
            if not WEIGHTS_ONLY_IS_ENOUGH:
                _refuse_code(path)
            module = torch.export.load(path, extra_files=files).module()
    except Exception as error:  # whatever a damaged archive leads to
        raise ExportError(f"torch cannot read {path}: {last_line(error)}") from error

    def run(images: NDArray[Any]) -> NDArray[numpy.float32]:
        with torch.inference_mode():
            found: NDArray[numpy.float32] = module(torch.from_numpy(images)).numpy()
        return found

    return files[KEY], run
