"""Hostile ``.pt2`` files, with any torch and without any extra."""

from __future__ import annotations

import io
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import tiny_vit
from torch import nn

from cpvit.export import ExportError, ExportOptions, export, open_exported, runtimes


def torchscript() -> bytes:
    payload = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; files of it are not gone
        torch.jit.save(torch.jit.script(nn.Linear(2, 3)), payload)
    return payload.getvalue()


def tar() -> bytes:
    payload = io.BytesIO()
    with tarfile.open(fileobj=payload, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return payload.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "m.pt2"
    export(tiny_vit(depth=1).float(), path, ExportOptions(to="torch"))
    return path


@pytest.mark.parametrize("payload", [torchscript, tar])
@pytest.mark.parametrize("torch_refuses", sorted({False, runtimes.WEIGHTS_ONLY_IS_ENOUGH}))
def test_parts_that_torch_would_run_or_unpack_are_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: object, torch_refuses: bool
) -> None:
    assert callable(payload)
    with zipfile.ZipFile(exported) as good, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        pickled = [name for name in good.namelist() if good.read(name)[:2] == b"PK"]
        assert pickled, "what the program was traced with"
        for name in good.namelist():
            bad.writestr(name, payload() if name in pickled else good.read(name))
    said = "torch cannot read"
    if not torch_refuses:
        monkeypatch.setattr(runtimes, "WEIGHTS_ONLY_IS_ENOUGH", False)
        said += f".*{pickled[0]} in it is a (TorchScript program|tar archive)"
    with pytest.raises(ExportError, match=said):
        open_exported(tmp_path / "bad.pt2")


def test_what_is_refused_there_is_not_in_a_whole_file(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "WEIGHTS_ONLY_IS_ENOUGH", False)
    assert open_exported(exported).description.model
