"""What the documentation says is true: its Python runs, its command lines parse, its links lead somewhere, it builds.

Python blocks run as they stand, file by file, in a folder of small stand-ins for the data they name. Where a number
would take hours it is replaced (``SMALLER``), and models that would be downloaded get random weights.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from browsing import absent
from conftest import add_member
from PIL import Image

from cpvit import PruneConfig, prune_, save_pruned
from cpvit.commands.cli import commands, parse
from cpvit.data import Preprocessing

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
CODE = [page for page in PAGES if "```python" in page.read_text()]
SIDE, CLASSES = 64, 10
SMALLER = {
    "num_steps=2000": "num_steps=2",
    "batch_size=64": "batch_size=4",
    "    ...\n": "    break\n",
    "os.sync()": "pass",
}
NOT_RUN = re.compile(r"<!-- not run: (.*?) -->\n```python\n(.*?)```\n", re.S)
"""Blocks that need what is not here; the page says what."""
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (25 * number % 256, 80, 160)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files under the names that the documentation uses."""
    tmp_path = tmp_path_factory.mktemp("documentation")
    with tarfile.open(tmp_path / "cifar10-jpeg.tar.gz", "w:gz") as archive:
        for split in ("train", "test"):
            for label in range(CLASSES):
                for number in range(2):
                    add_member(archive, f"{split}/{label:02}/{number}.png", png(label))
    for shards, count in (("imagenet/train-{:06d}.tar", 1282), ("shards/{:06d}.tar", 2)):
        (tmp_path / shards).parent.mkdir()
        for shard in range(count):
            with tarfile.open(tmp_path / shards.format(shard), "w") as archive:
                add_member(archive, f"{shard:06d}.png", png(shard))
                add_member(archive, f"{shard:06d}.cls", b"1")
    return tmp_path


@pytest.fixture
def names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the text around the blocks speaks of."""
    made = timm.create_model

    def create_model(name: str, *, pretrained: bool = False, **options: Any) -> Any:
        return made(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=CLASSES, img_size=SIDE).eval()
    pixels = torch.rand(4, 3, SIDE, SIDE)
    preprocessing = Preprocessing.from_model(model)
    pruned = copy.deepcopy(model)
    prune_(pruned, PruneConfig(macs=0.7))
    if not Path("runs").exists():
        save_pruned(pruned, "runs/merge/best")
    return {
        "model": model,
        "images": pixels - 0.5,
        "pixels": pixels,
        "grid": model.patch_embed.grid_size,
        "preprocessing": preprocessing,
        "__name__": "documentation",
    }


@pytest.mark.parametrize("page", CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_python_blocks_run(page: Path, folder: Path, names: dict[str, Any]) -> None:
    sybil = pytest.importorskip("sybil")
    markdown = pytest.importorskip("sybil.parsers.markdown")
    text = NOT_RUN.sub("", page.read_text())
    for long, short in SMALLER.items():
        text = text.replace(long, short)
    smaller = folder / page.name
    smaller.write_text(text)
    document = sybil.Sybil(parsers=[markdown.PythonCodeBlockParser()]).parse(smaller)
    document.namespace.update(names)
    examples = list(document.examples())
    assert len(examples) == text.count("```python")
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("page", CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_that_do_not_run_say_why_and_are_python(page: Path) -> None:
    for reason, block in NOT_RUN.findall(page.read_text()):
        assert len(reason.split()) > 2
        compile(block, page.name, "exec")


def code_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)


def command_lines() -> Iterator[tuple[str, str]]:
    """Every cpvit command of a code block, with its continued lines."""
    for page in PAGES:
        for language, block in code_blocks(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines() if not language else ():
                found = re.match(
                    r"(?:.* && |torchrun .*\$\(which )?cpvit\)? ([a-z-].*)", line.split(" > ")[0]
                )
                if found is not None:
                    yield page.relative_to(ROOT).as_posix(), found[1]


@pytest.mark.parametrize(("page", "line"), sorted(set(command_lines())))
def test_command_lines_are_understood(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--help" in line or "--tyro-print-completion" in line:
        return
    try:
        parse(commands(), shlex.split(line), "cpvit")
    except SystemExit:
        pytest.fail(f"{page}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link) and not link.startswith("#"):
            assert (page.parent / link.split("#")[0]).exists(), f"{name} links to {link}"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert {path.relative_to(ROOT / "docs").as_posix() for path in PAGES if path.parent != ROOT} == listed


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            absent(f"{package} is not installed: pip install 'cpvit[docs]'")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    page = (tmp_path / "site/reference/pruning/index.html").read_text()
    assert "prune_" in page
    assert "Raises" in page
