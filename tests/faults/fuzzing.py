"""Damaged files: allowed are success and a named error, within seconds."""

from __future__ import annotations

import io
import json
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

from cpvit import Plan, PruneConfig, load_pruned, prune_, save_pruned
from cpvit.commands.cli import USER_ERRORS
from cpvit.data import Preprocessing, find_samples, make_loader
from cpvit.data.images import decode
from cpvit.export import ExportOptions, export, open_exported
from cpvit.export.description import SUFFIXES, Format
from cpvit.plans.escalation import load_plan
from cpvit.report import ReportError, load_record, write_report
from cpvit.weights.loading import load_checkpoint
from tests.faults.subjects import inputs, network_of

Fuzzer: TypeAlias = tuple[Callable[[bytes, Path], object], Callable[[], bytes]]
"""What reads a damaged file in a folder, and what makes a whole one."""

MODEL = "test_vit"
SECONDS = 20.0
"""No damaged file may keep a reader for longer, even on a busy machine."""


def case(read: Callable[[bytes, Path], object], whole: Callable[[], bytes], seed: int) -> str:
    """Damage a file and read it.

    Raises:
        AssertionError: It took too long.
        Exception: Whatever is not an error meant for the user.
    """
    damaged = mutated(whole(), random.Random(seed))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            read(damaged, Path(folder))
            outcome, said = "read", True
        except USER_ERRORS as error:
            outcome, said = f"refused ({type(error).__name__})", bool(str(error))
    assert said, f"{outcome} without a word"
    assert "Unicode" not in outcome, f"{outcome}: an error of the codec names neither the file nor what to do"
    assert time.monotonic() - start < SECONDS, "took too long"
    return outcome


def mutated(data: bytes, choose: random.Random) -> bytes:
    """Flip bits, cut, double, overwrite or insert; one to four times."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        place = (
            choose.randrange(len(changed))
            if choose.random() < 0.5
            else choose.randrange(min(600, len(changed)))
        )
        length = choose.choice((1, 2, 4, 8, 64, 1024))
        kind = choose.choice(("flip", "cut", "drop", "double", "zero", "noise", "insert", "digit"))
        if kind == "flip":
            changed[place] ^= 1 << choose.randrange(8)
        elif kind == "cut":
            del changed[place + 1 :]
        elif kind == "drop":
            del changed[place : place + length]
        elif kind == "double":
            changed[place:place] = changed[place : place + length]
        elif kind == "zero":
            changed[place : place + length] = bytes(len(changed[place : place + length]))
        elif kind == "noise":
            changed[place : place + length] = choose.randbytes(len(changed[place : place + length]))
        elif kind == "insert":
            changed[place:place] = choose.randbytes(length)
        else:
            changed[place] = choose.choice(b'0123456789-eE.,"[]{}')
        if not changed:
            return b""
    return bytes(changed)


# --- what is read, and from what ---------------------------------------------------------------------------------


@cache
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODEL, num_classes=3).eval()


@cache
def safetensors_file() -> bytes:
    return save(model().state_dict())


@cache
def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": model().state_dict()}, buffer)
    return buffer.getvalue()


@cache
def numpy_file() -> bytes:
    buffer = io.BytesIO()
    np.savez(
        buffer, **{name.replace(".", "/"): value.numpy() for name, value in model().state_dict().items()}
    )
    return buffer.getvalue()


@cache
def saved_folder() -> Mapping[str, bytes]:
    """Files of a model that was pruned and saved."""
    pruned = timm.create_model(MODEL, num_classes=3).eval()
    prune_(pruned, PruneConfig(method="cpvit-merge", macs=0.7))
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(pruned, Path(folder) / "saved")
        files = (path for path in (Path(folder) / "saved").iterdir() if path.is_file())
        return MappingProxyType({path.name: path.read_bytes() for path in files})


@cache
def plan_file() -> bytes:
    (name,) = [name for name in saved_folder() if "plan" in name]
    return saved_folder()[name]


@cache
def picture(kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@cache
def tar_file() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(picture())
            archive.addfile(member, io.BytesIO(picture()))
    return buffer.getvalue()


def read_checkpoint(suffix: str, data: bytes, folder: Path) -> None:
    path = folder / f"weights{suffix}"
    path.write_bytes(data)
    load_checkpoint(model(), path)


def read_plan(data: bytes, folder: Path) -> None:
    path = folder / "plan.json"
    path.write_bytes(data)
    load_plan(path)
    Plan.load(path)


def read_saved(damaged: str, data: bytes, folder: Path) -> None:
    for name, content in saved_folder().items():
        (folder / name).write_bytes(data if name == damaged else content)
    load_pruned(folder)


def read_tar(data: bytes, folder: Path) -> None:
    path = folder / "images.tar"
    path.write_bytes(data)
    preprocessing = Preprocessing((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for _ in make_loader(find_samples(path), preprocessing, labels=None, batch_size=2):
        pass


def read_picture(data: bytes, folder: Path) -> None:
    decode(data, "picture")


@cache
def record_file() -> bytes:
    """What ``cpvit eval --json`` writes, images and all."""
    return inputs().record.read_bytes()


def one_block() -> nn.Module:
    """torch builds a graph operation by operation, OpenVINO compiles it: more blocks take longer, and say no more."""
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=3
    ).eval()


@cache
def exported_files(to: Format) -> Mapping[str, bytes]:
    """What ``open_exported`` reads, by suffix: one file, or OpenVINO's pair."""
    pruned, macs = (network_of(0), 0.7) if to == "onnx" else (one_block(), 0.9)
    prune_(pruned, PruneConfig(method="cpvit-merge", macs=macs))
    with tempfile.TemporaryDirectory() as folder:
        export(pruned, Path(folder) / f"model{SUFFIXES[to]}", ExportOptions(to=to))
        files = (path for path in Path(folder).iterdir() if path.suffix != ".json")
        return MappingProxyType({path.suffix: path.read_bytes() for path in files})


def read_record(data: bytes, folder: Path) -> None:
    path = folder / "record.json"
    path.write_bytes(data)
    try:
        write_report([load_record(path)], folder / "page.html")
    except ReportError:
        raise
    except ValueError as error:
        raise AssertionError(f"does not say what is wrong, and where: {error}") from error


def read_exported(to: Format, damaged: str, data: bytes, folder: Path) -> None:
    for suffix, content in exported_files(to).items():
        (folder / f"model{suffix}").write_bytes(data if suffix == damaged else content)
    open_exported(folder / f"model{SUFFIXES[to]}", threads=1)


def fuzzers() -> dict[str, Callable[[int], str]]:
    """Every kind of file that the package reads, by name."""
    kinds: dict[str, Fuzzer] = {
        "checkpoint, safetensors": (partial(read_checkpoint, ".safetensors"), safetensors_file),
        "checkpoint, pth": (partial(read_checkpoint, ".pth"), torch_file),
        "checkpoint, npz": (partial(read_checkpoint, ".npz"), numpy_file),
        "plan": (read_plan, plan_file),
        "tar": (read_tar, tar_file),
        "JPEG": (read_picture, picture),
        "PNG": (read_picture, partial(picture, "PNG")),
        "WebP": (read_picture, partial(picture, "WEBP")),
    }
    if find_spec("jinja2") and find_spec("vl_convert"):
        kinds["record"] = (read_record, record_file)
    kinds["exported, torch"] = _exported("torch", ".pt2")
    if find_spec("onnxruntime"):
        kinds["exported, ONNX"] = _exported("onnx", ".onnx")
    if find_spec("openvino"):
        kinds["exported, OpenVINO"] = _exported("openvino", ".xml")
        kinds["exported, OpenVINO's weights"] = _exported("openvino", ".bin")
    for name in saved_folder():
        kinds[f"saved folder, {name}"] = (partial(read_saved, name), partial(_saved, name))
    return {name: partial(case, read, whole) for name, (read, whole) in kinds.items()}


def _exported(to: Format, damaged: str) -> Fuzzer:
    return partial(read_exported, to, damaged), lambda: exported_files(to)[damaged]


def _saved(name: str) -> bytes:
    return saved_folder()[name]


# --- made to harm ------------------------------------------------------------------------------------------------


class Hostile:
    """Unpickling this would make a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def hostile_files(trap: Path) -> dict[str, bytes]:
    """Checkpoints, plans and archives that attack their reader, by the name they are written to."""
    pickled = io.BytesIO()
    torch.save({"model": Hostile(str(trap))}, pickled)
    array = io.BytesIO()
    np.savez(array, weights=np.array([Hostile(str(trap))], dtype=object))
    nested = b"[" * 100_000
    endless = save({"x" * 2**20: torch.zeros(1)})
    return {
        "pickle.pth": pickled.getvalue(),
        "pickle.npz": array.getvalue(),
        "nested.json": nested,
        "deep.json": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "long-name.safetensors": endless,
        "header.safetensors": (2**62).to_bytes(8, "little") + b"{}",
        "not-finite.json": json.dumps({"macs_ratio": float("nan")}).encode(),
        "linking.tar": _tar({}, links={"a/1.jpg": "/etc/passwd"}),
        "bomb.tar": _tar({"a/1.png": _bomb()}),
    }


def climbing_tar(target: Path) -> bytes:
    """An archive whose members would leave the folder it is unpacked into; nothing here unpacks archives."""
    return _tar({"../../climbed/1.jpg": picture(), f"{target}/2.jpg": picture()})


def _tar(files: Mapping[str, bytes], links: Mapping[str, str] = MappingProxyType({})) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return buffer.getvalue()


@cache
def _bomb() -> bytes:
    """A PNG of a few kilobytes that decodes to 900 megapixels."""
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    return buffer.getvalue()
