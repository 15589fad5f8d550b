"""The commands that write, each on a tiny model and a few images, so that a run takes a second or two."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from cpvit import PruneConfig, prune_, save_pruned
from cpvit.commands.cli import commands, main, run_cli
from tests.faults.children import finished
from tests.faults.wholeness import products

MODEL, SIDE, CLASSES = "test_vit", 64, ("ant", "bee", "cat")


@dataclass(frozen=True)
class Subject:
    """Something that writes into a folder."""

    name: str
    run: Callable[[Path], int]
    """From the folder to an exit status; what goes wrong stands on stderr."""
    again: bool = False
    """Whether it goes on where it was stopped; others begin anew."""
    processes: int = 1


@dataclass(frozen=True)
class Inputs:
    """What the commands read."""

    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def test(self) -> Path:
        return self.data / "test"

    @property
    def record(self) -> Path:
        return self.folder / "record.json"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cpvit-faults-")


@cache
def inputs() -> Inputs:
    """Made once."""
    found = Inputs(Path(_folder().name))
    network = network_of(0)
    save_file(network.state_dict(), found.weights)
    for split, count in (("train", 6), ("test", 4)):
        for label, name in enumerate(CLASSES):
            (found.data / split / name).mkdir(parents=True)
            for number in range(count):
                _picture(found.data / split / name / f"{number}.png", 100 * label + number)
    line = [*asked("eval"), "--data", str(found.test), "--macs", "0.7", "--json", str(found.record)]
    status, _ = finished(lambda: main(line), found.folder / "said")
    assert status == 0, (found.folder / "said").read_text()
    return found


def network_of(seed: int) -> torch.nn.Module:
    """With weights strong enough that every patch has an influence of its own."""
    torch.manual_seed(seed)
    network = timm.create_model(MODEL, num_classes=len(CLASSES), img_size=SIDE).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def _picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 66, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def asked(verb: str) -> list[str]:
    """A command line up to the model and its weights."""
    model = ["--model", MODEL, "--image-size", str(SIDE), "--device", "cpu"]
    return [verb, "--quiet", *model, "--checkpoint", str(Path(_folder().name) / "weights.safetensors")]


def line_of(name: str, out: Path) -> list[str]:
    """The command line of a subject."""
    made = inputs()
    small = ["--macs", "0.7"]
    calibrated = ["--data", str(made.test), "--limit", "9", "--batch-size", "9"]
    lines: Mapping[str, list[str]] = {
        "finetune": [
            *asked("finetune"), "--data", str(made.data), *small, "--method", "cpvit-merge", "--num-steps", "10",
            "--batch-size", "4", "--eval-every", "4", "--checkpoint-every", "1", "--ema-decay", "0.9",
            "--learning-rate", "1e-3", "--drop-path", "0.2", "--no-tensorboard", "--resume",
            "--output-dir", str(out / "run"),
        ],
        "plan": [
            *asked("plan"), *calibrated, *small, "--trials", "30", "--out", str(out / "plan.json"),
            "--json", str(out / "record.json"),
        ],
        "export": [
            *asked("export"), *small, "--to", "onnx", "--out", str(out / "model.onnx"),
            "--json", str(out / "record.json"),
        ],
        "export torch": [*asked("export"), *small, "--to", "torch", "--out", str(out / "model.pt2")],
        "predict": [
            *asked("predict"), "--data", str(made.data), *small, "--out", str(out / "labels"), "--top-k", "2",
            "--rows-per-part", "3", "--batch-size", "2", "--resume",
        ],
        "embed": [
            *asked("embed"), "--data", str(made.data), "--keep-rate", "0.5", "--out", str(out / "vectors"),
            "--features", "tokens", "--rows-per-part", "3", "--batch-size", "2", "--resume",
        ],
        "eval": [*asked("eval"), *calibrated, *small, "--json", str(out / "record.json")],
        "sweep": [
            *asked("sweep"), *calibrated, "--methods", "cpvit,cpvit-merge,tome", "--macs", "0.8,0.6",
            "--json", str(out / "record.json"), "--plot", str(out / "curve.png"),
        ],
        "report": ["report", "--quiet", str(made.record), "--out", str(out / "page.html")],
    }  # fmt: skip
    return lines[name]


WRITING = ("finetune", "plan", "export", "export torch", "predict", "embed", "eval", "sweep", "report")
"""Commands that leave files."""


def subjects() -> dict[str, Subject]:
    """By name."""
    commands()
    found = [
        Subject(name, _command(name), again=name in ("finetune", "plan", "predict", "embed"))
        for name in WRITING
    ]
    twice = _both(_command("finetune"))
    found.append(Subject("finetune, two processes", twice, again=True, processes=2))
    found.append(Subject("save_pruned", _saving))
    return {subject.name: subject for subject in found}


def import_early(names: Sequence[str]) -> None:
    """What a child imported late, so that the next one need not; importing starts no threads."""
    for name in names:
        with suppress(Exception):
            import_module(name)


def _command(name: str) -> Callable[[Path], int]:
    return lambda out: main(line_of(name, out))


def _saving(out: Path) -> int:
    """A script that uses the library, with the command line's one line for errors."""

    def save() -> None:
        network = network_of(0)
        prune_(network, PruneConfig(method="cpvit-merge", macs=0.7))
        save_pruned(network, out / "saved")

    return run_cli(save, [], prog="cpvit")


def _both(command: Callable[[Path], int]) -> Callable[[Path], int]:
    return lambda out: together(lambda: command(out))


def together(work: Callable[[], int]) -> int:
    """As torchrun would: two processes do it, told by the environment who they are."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    other = os.fork()
    rank = 0 if other else 1
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {key: str(value) for key, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = work()
    if not other:
        os._exit(status)
    return status or os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to."""

    products: dict[str, object]
    seconds: float
    largest: int
    """Bytes of its largest file."""
    total: int
    """Bytes of all files."""


@cache
def undisturbed(name: str) -> Undisturbed:
    """The run of a subject to compare with; made once.

    Raises:
        AssertionError: It failed.
    """
    out = inputs().folder / "undisturbed" / name.replace(" ", "-")
    out.mkdir(parents=True)
    subject = subjects()[name]
    said = inputs().folder / "said"
    seen = set(sys.modules)

    def run() -> int:
        status = subject.run(out)
        late = [name for name in sys.modules if name not in seen and name != "__main__"]
        (inputs().folder / "late").write_text("\n".join(late))
        return status

    status, seconds = finished(run, said)
    assert status == 0, f"{name} failed undisturbed: {said.read_text()[-2000:]}"
    import_early((inputs().folder / "late").read_text().split())
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    return Undisturbed(products(out), seconds, max(sizes), sum(sizes))
