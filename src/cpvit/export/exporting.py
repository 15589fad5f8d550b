"""From a model to a file that was run and compared before it is put into its place."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cpvit.adapters import Host
from cpvit.data import Preprocessing
from cpvit.export.description import (
    SUFFIXES,
    Description,
    ExportError,
    Format,
    Parity,
    Precision,
    beside,
)
from cpvit.export.drafts import Drafts
from cpvit.export.parity import check, compare
from cpvit.export.program import Deployed, digest, for_cpu, to_uint8, trace
from cpvit.export.requirements import EXTRAS, check_torch, required
from cpvit.export.runtimes import ExportedModel, open_exported
from cpvit.machine.environment import describe_environment
from cpvit.machine.timer import OnMessage
from cpvit.plans.macs import host_macs
from cpvit.pruning.escalation import EscalatingModel
from cpvit.pruning.install import installed
from cpvit.pruning.opening import open_as_it_is

NOISE_IMAGES = 16
NEEDS: Mapping[Format, tuple[str, ...]] = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


@dataclass(frozen=True)
class ExportOptions:
    """What kind of file."""

    to: Format = "onnx"
    """onnx, openvino (an .xml and a .bin), or torch (a torch.export program, .pt2)."""
    batch_size: int | None = None
    """Images in every batch; by default any number."""
    with_preprocessing: bool = False
    """Take [B H W 3] uint8 RGB and normalise inside; by default [B 3 H W] float32, normalised already."""
    int8: bool = False
    """Weights and activations of the linear layers in int8; needs calibration images."""
    int8_weights: bool = False
    """Weights alone in int8, arithmetic in float32: for one image at a time. OpenVINO only."""

    @property
    def precision(self) -> Precision:
        """By the name it has in records."""
        return "int8" if self.int8 else "int8-weights" if self.int8_weights else "float32"


STAGES = 3
"""Of an export, for a progress bar."""


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    path: Path
    description: Description
    parity: Parity
    bytes: int
    seconds: float


def export(
    model: nn.Module,
    path: str | Path,
    options: ExportOptions | None = None,
    *,
    images: Tensor | None = None,
    preprocessing: Preprocessing | None = None,
    classes: tuple[str, ...] | None = None,
    most_kl: float | None = None,
    on_message: OnMessage = lambda _: None,
) -> Exported:
    """Write a dense or pruned model to a file for another runtime, and compare the two.

    The file is written beside its place, run in its own runtime, and put there only if it answers as torch does. The
    model is left untouched; what is exported is its float32 form in eval mode.

    Args:
        model: Dense or pruned.
        path: ``.onnx``, ``.xml`` or ``.pt2``, as ``options.to`` says; overwritten. ``path.json`` describes it.
        options: What kind of file.
        images: [B 3 H W] normalised: what torch and the file are compared on; without them that is noise. For int8
            three quarters of them calibrate it and the rest compare.
        preprocessing: Of the images, to be described, and to be put inside with ``with_preprocessing``.
        classes: Names of the outputs, to be described.
        most_kl: Divergence in nats at which the file is refused; by default 0.0001 in float32, 0.25 in int8.
        on_message: Called with what is done next, :data:`STAGES` times.

    Raises:
        ExportError: The model or the options cannot be exported, a package is missing, or the file answers otherwise.
        UnsupportedModelError: The model cannot be opened.
        OSError: The file cannot be written.
    """
    start = time.perf_counter()
    on_message("open the model")
    options = ExportOptions() if options is None else options
    target = Path(path).expanduser()
    _check_options(model, target, options, images, preprocessing)
    host = for_cpu(open_as_it_is(model)[0])
    inside = preprocessing if options.with_preprocessing else None
    program = Deployed(host, inside).eval()
    samples = _noise(host) if images is None else images.float().cpu()
    _check_images(host, samples)
    inputs = samples if inside is None else to_uint8(samples, inside)
    description = _description(host, program, options, preprocessing, classes, inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    held_out = _held_out(len(samples)) if options.int8 else 0
    seen, unseen = samples[: len(samples) - held_out], samples[-held_out:] if held_out else samples
    compared = partial(compare, program, images=unseen, real=images is not None, most_kl=most_kl)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        drafts = Drafts(description, Path(folder), target.name, inputs[: len(seen)])
        on_message("trace the model")
        traced = trace(program, inputs if len(inputs) > 1 else inputs.repeat(2, 1, 1, 1), options.batch_size)
        on_message(f"write {options.precision} for {options.to}, run it, compare")
        made, parity = _closest(drafts.write(traced), compared)
        check(parity, options.precision)
        found = Exported(
            path=target,
            description=description,
            parity=parity,
            bytes=sum(file.stat().st_size for file in made.parent.iterdir()),
            seconds=time.perf_counter() - start,
        )
        beside(made).write_text(json.dumps(_report(found), indent=2) + "\n")
        put(made.parent, target)
    return found


def put(folder: Path, target: Path) -> None:
    """Move the files of an export to their places; what is killed meanwhile leaves a whole export, or none."""
    if any(file.name not in (target.name, beside(target).name) for file in folder.iterdir()):
        # Weights of their own: the old graph must never meet the new ones.
        target.unlink(missing_ok=True)
    # The file that names the others comes last, so that a reader never meets it without them.
    for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):
        file.replace(target.parent / file.name)


def _check_options(
    model: nn.Module,
    target: Path,
    options: ExportOptions,
    images: Tensor | None,
    preprocessing: Preprocessing | None,
) -> None:
    if isinstance(model, EscalatingModel):
        raise ExportError(
            "two stages cannot be exported: which images run again depends on their values; export the light plan"
        )
    if options.to not in SUFFIXES:
        raise ExportError(f"to must be one of {', '.join(SUFFIXES)}, got {options.to!r}")
    if target.suffix != SUFFIXES[options.to]:
        raise ExportError(f"a file for {options.to} ends in {SUFFIXES[options.to]}, got {target.name}")
    if target.is_dir():
        raise ExportError(f"{target} is a folder; give the name of a file")
    if options.batch_size is not None and options.batch_size < 1:
        raise ExportError(f"batch_size must be at least 1, got {options.batch_size}")
    if options.with_preprocessing and preprocessing is None:
        raise ExportError("with_preprocessing needs to know the model's preprocessing: give mean and std")
    _check_int8(options, images)
    if options.to != "torch":
        check_torch()
    for package in NEEDS[options.to]:
        required(package)


def _check_int8(options: ExportOptions, images: Tensor | None) -> None:
    if options.int8 and options.int8_weights:
        raise ExportError("give int8 or int8_weights, not both")
    if options.precision == "float32":
        return
    if options.to == "torch":
        raise ExportError("int8 is written for onnx and openvino; torch.export programs are float32")
    if options.int8_weights and options.to != "openvino":
        raise ExportError(
            "int8 weights with float32 arithmetic are for openvino: ONNX Runtime unpacks them at load and gains nothing"
        )
    if options.int8 and (images is None or len(images) == 0):
        raise ExportError(
            "int8 needs calibration images, which set the ranges of the activations; give some (a hundred, no labels)"
        )
    required("nncf")


def _check_images(host: Host, images: Tensor) -> None:
    if images.dim() != 4 or tuple(images.shape[1:]) != host.image_shape or len(images) == 0:
        raise ExportError(
            f"images must be [B {' '.join(map(str, host.image_shape))}] for {host.name}, got {tuple(images.shape)}"
        )


def _noise(host: Host) -> Tensor:
    return torch.randn(NOISE_IMAGES, *host.image_shape, generator=torch.Generator().manual_seed(0))


def _description(
    host: Host,
    program: Deployed,
    options: ExportOptions,
    preprocessing: Preprocessing | None,
    classes: tuple[str, ...] | None,
    inputs: Tensor,
) -> Description:
    with torch.inference_mode():
        outputs = program(inputs[:2])
    if outputs.dim() != 2:
        raise ExportError(
            f"{host.name} answers {tuple(outputs.shape)} to two images; what is exported gives one row each"
        )
    container = installed(host)
    versions = describe_environment(host.device, host.dtype, 0).versions | _versions(options)
    return Description(
        format=options.to,
        precision=options.precision,
        model=host.name,
        plan=None if container is None else container.plan,
        macs=host_macs(host),
        weights_sha256=digest(host.model),
        image_size=(host.image_shape[1], host.image_shape[2]),
        batch_size=options.batch_size,
        preprocessing=preprocessing,
        normalized_inside=options.with_preprocessing,
        num_outputs=outputs.shape[1],
        classes=classes if classes is not None and len(classes) == outputs.shape[1] else None,
        versions=versions,
    )


def _versions(options: ExportOptions) -> dict[str, str]:
    packages = [*NEEDS[options.to], *(["nncf"] if options.precision != "float32" else [])]
    return {name: str(required(name).__version__) for name in packages if name in EXTRAS}


def _held_out(images: int) -> int:
    """Images to compare on that int8 is not calibrated on: the ranges fit those it has seen."""
    return images // 4 if images >= 8 else 0


def _closest(drafts: Iterator[Path], compared: Callable[[ExportedModel], Parity]) -> tuple[Path, Parity]:
    """The draft that answers most as torch does."""
    found = [(draft, compared(open_exported(draft))) for draft in drafts]
    return min(found, key=lambda pair: pair[1].distance)


def _report(found: Exported) -> dict[str, object]:
    return {
        **found.description.values(),
        "parity": dataclasses.asdict(found.parity),
        "bytes": found.bytes,
        "seconds": round(found.seconds, 2),
    }
