"""What the subcommands share: building models and loaders, writing the record."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from cpvit.adapters import Host, open_host
from cpvit.commands.options import (
    CalibrationOptions,
    DataOptions,
    ImageRecordOptions,
    ModelOptions,
    PreprocessingOptions,
)
from cpvit.commands.records import is_first as is_first
from cpvit.commands.records import write_record as write_record
from cpvit.commands.terminal import progress as progress
from cpvit.commands.terminal import progress_bar as progress_bar
from cpvit.commands.terminal import say as say
from cpvit.data import Batches, ImageSource, Preprocessing, find_samples, label_map, make_loader
from cpvit.machine.device import choose_device, choose_dtype
from cpvit.machine.processes import Processes, start_processes
from cpvit.measure.examples import ExampleOptions
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig
from cpvit.plans.escalation import Escalation, load_plan
from cpvit.plans.plan import Plan
from cpvit.pruning.calibrate import calibrate
from cpvit.weights.create import create_model
from cpvit.weights.libraries import is_saved_folder
from cpvit.weights.loading import load_checkpoint
from cpvit.weights.reading import head_classes

CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}


@contextmanager
def joined(options: ModelOptions, *, patience: timedelta | None = None) -> Iterator[Processes | None]:
    """The processes that torchrun or accelerate started with this one, of which only the first prints; else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    processes = start_processes(options.device, patience=patience)
    with ExitStack() as stack:
        stack.callback(processes.part)
        if not processes.is_main:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield processes


def build_model(options: ModelOptions, *, data: str | None = None, weights_needed: bool = True) -> nn.Module:
    """The model with its weights, on its device, in eval mode; prints what was loaded.

    Raises:
        ValueError: No weights where they are needed, or they do not fit.
        UnsupportedModelError: The model cannot be pruned.
    """
    return open_model(options, data=data, weights_needed=weights_needed).model


def open_model(options: ModelOptions, *, data: str | None = None, weights_needed: bool = True) -> Host:
    """:func:`build_model`, opened."""
    if options.checkpoint is not None and options.pretrained:
        raise ValueError("give --checkpoint or --pretrained, not both")
    brings_weights = is_saved_folder(options.model)
    if brings_weights and (options.checkpoint is not None or options.pretrained):
        raise ValueError(f"{options.model} brings its weights; leave out --checkpoint and --pretrained")
    if weights_needed and options.checkpoint is None and not options.pretrained and not brings_weights:
        raise ValueError(
            "random weights have no accuracy to measure: give --checkpoint FILE, or --pretrained"
        )
    host = open_named(
        options.model,
        num_classes=_num_classes(options, data),
        image_size=image_size_of(options.image_size),
        pretrained=options.pretrained,
    )
    if options.checkpoint is not None:
        say(load_checkpoint(host.model, options.checkpoint).summary())
    host.model.to(choose_device(options.device), choose_dtype(options.dtype)).eval()
    return host


def open_named(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
) -> Host:
    """A model of this name; one that cannot be pruned is refused here, before large files are read.

    Raises:
        ValueError: The name is unknown, or a size is impossible.
        UnsupportedModelError: The model cannot be pruned.
    """
    return open_host(
        create_model(name, num_classes=num_classes, image_size=image_size, pretrained=pretrained)
    )


def _num_classes(options: ModelOptions, data: str | None) -> int | None:
    if options.num_classes is not None:
        return options.num_classes
    if options.checkpoint is not None:
        return head_classes(options.checkpoint)
    return None if is_saved_folder(options.model) else CIFAR_CLASSES.get(data or "")


def image_size_of(size: tuple[int, ...] | None) -> int | tuple[int, int] | None:
    """What ``--image-size`` means.

    Raises:
        ValueError: More than two numbers.
    """
    if size is None:
        return None
    if len(size) > 2:
        raise ValueError(f"--image-size takes one number, or height and width, got {len(size)} numbers")
    return size[0] if len(size) == 1 else (size[0], size[1])


def build_batches(
    model: nn.Module,
    options: DataOptions,
    preprocessing: PreprocessingOptions,
    processes: Processes | None = None,
    classes: int | None = None,
) -> Batches:
    """Labelled batches of what ``--data`` names, with the model's classes unless another number is given."""
    classes = data_shape(model)[0] if classes is None else classes
    return labelled_batches(options, build_preprocessing(model, preprocessing), classes, processes)


def labelled_batches(
    options: DataOptions, preprocessing: Preprocessing, classes: int, processes: Processes | None
) -> Batches:
    """Of several processes each gets its share."""
    source = open_source(options)
    return make_loader(
        source.limited(options.limit, options.seed),
        preprocessing,
        labels=label_map(source, classes),
        batch_size=options.batch_size,
        num_workers=options.workers,
        skip_bad_images=options.skip_bad_images,
        rank=0 if processes is None else processes.rank,
        world_size=1 if processes is None else processes.world_size,
    )


def data_shape(model: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Classes of the model, 0 without a classifier, and height and width of its images."""
    host = open_host(model)
    return host.num_classes, host.image_shape[-2:]


def open_source(options: DataOptions) -> ImageSource:
    """List the images ``--data`` names, less those to leave out."""
    source = find_samples(
        options.data, split=options.split, data_dir=options.data_dir, download=options.download
    )
    return source if options.leave_out is None else source.split(options.leave_out, options.seed)[1]


def build_preprocessing(model: nn.Module, options: PreprocessingOptions) -> Preprocessing:
    """The model's own preprocessing with the user's changes."""
    return Preprocessing.from_model(
        model,
        image_size=data_shape(model)[1],
        mean=options.mean,
        std=options.std,
        interpolation=options.interpolation,
        crop_pct=options.crop_pct,
    )


def build_examples(
    model: nn.Module, preprocessing: PreprocessingOptions, output: ImageRecordOptions
) -> ExampleOptions:
    """What ``--gallery`` asks for, with what this model's images were normalised by and its classes' names."""
    prepared = build_preprocessing(model, preprocessing)
    return ExampleOptions(output.shown, 3 * output.shown, prepared.mean, prepared.std, class_names(model))


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """What a transformers model calls its classes, or ImageNet-1k's for any other of a thousand; None if unknown."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if names:
        return tuple(str(names[number]) for number in sorted(names))
    if data_shape(model)[0] != 1000:
        return None
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_descriptions())


def build_calibration(
    model: nn.Module,
    options: CalibrationOptions,
    preprocessing: PreprocessingOptions,
    *,
    seed: int,
    fallback: DataOptions | None = None,
) -> Calibration | None:
    """Calibrate on what ``--calibration`` names; on a sample of ``fallback`` if that is given instead; else None."""
    if options.calibration is not None:
        source = find_samples(options.calibration)
    elif fallback is not None:
        source = open_source(fallback)
        say(
            "calibration: no --calibration given, so what the heads need is measured on "
            f"{options.calibration_limit} of the evaluated images (no labels used); give --calibration to keep the "
            "two apart"
        )
    else:
        return None
    batches = make_loader(
        source.limited(options.calibration_limit, seed),
        build_preprocessing(model, preprocessing),
        labels=None,
        batch_size=16,
    )
    return calibrate(model, _images(batches))


def _images(batches: Batches) -> Iterator[Tensor]:
    for batch in progress(batches, "calibration", len(batches)):
        yield batch.images


def set_seed(seed: int) -> None:
    """Seed torch; everything else takes the seed explicitly."""
    torch.manual_seed(seed)


def words(text: str) -> tuple[str, ...]:
    """A comma-separated list."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> tuple[float, ...]:
    """A comma-separated list of numbers.

    Raises:
        ValueError: Something else.
    """
    try:
        return tuple(float(word) for word in words(text))
    except ValueError:
        raise ValueError(f"expected numbers separated by commas, got {text!r}") from None


def whole_numbers(text: str) -> tuple[int, ...]:
    """A comma-separated list of whole numbers.

    Raises:
        ValueError: Something else.
    """
    try:
        return tuple(int(word) for word in words(text))
    except ValueError:
        raise ValueError(f"expected whole numbers separated by commas, got {text!r}") from None


def heads_need_images(config: PruneConfig | Plan | Escalation) -> bool:
    """Whether heads are to be chosen, or made up for, on calibration images."""
    if isinstance(config, Escalation):
        return False
    if isinstance(config, Plan):
        return config.head_correction
    return config.head_keep_rate < 1 and config.head_mode == "slice"


def planned(
    pruning: PruneConfig, plan: Path | None, *, default: PruneConfig | None = None
) -> PruneConfig | Plan | Escalation:
    """The plan (or two) of a file if one is given, else the configuration; ``default`` is what that is
    if nothing is said.

    Raises:
        ValueError: Both are given, or the file is not a plan.
    """
    if plan is None:
        return pruning
    if pruning != (PruneConfig() if default is None else default):
        raise ValueError(
            "--plan holds the method and every count; leave out --method, --macs, --keep-rate and the like"
        )
    return load_plan(plan)
