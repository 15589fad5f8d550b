"""The command lines of the original CP-ViT code, understood unchanged; the work is done by the package.

Its images are resized to a square (bilinear, no crop) and normalised with mean = std = 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cpvit.commands.common import progress, say, set_seed
from cpvit.commands.tables import eval_text, finetune_text
from cpvit.data import (
    Augmentation,
    Batches,
    Preprocessing,
    TrainBatches,
    TrainLoaderOptions,
    find_samples,
    label_map,
    make_loader,
    make_train_batches,
)
from cpvit.finetune import (
    CallbackList,
    FinetuneConfig,
    OptimizerConfig,
    Processes,
    RunOptions,
    finetune,
    start_processes,
)
from cpvit.finetune.progress import ProgressBar
from cpvit.finetune.tensorboard import TensorBoard
from cpvit.machine.device import choose_device, choose_dtype
from cpvit.measure.evaluate import evaluate
from cpvit.plans.config import PruneConfig
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint

CLASSES = {"cifar10": 10, "cifar100": 100}


@dataclass(frozen=True)
class SeedArguments:
    """Flags of the original eval.py and train.py, and the few that were added."""

    name: str = "CP-ViT"
    """Name of this run."""
    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """Which images, and how many classes."""
    model_type: Literal["ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14"] = "ViT-B_16"
    """Which model."""
    pretrained_dir: Path = Path("output/cifar10_checkpoint.pth")
    """The checkpoint file."""
    output_dir: Path = Path("output")
    """Where results are written."""
    data_dir: Path = Path("data")
    """An existing CIFAR folder: torchvision's, or train/ and test/ with a folder per class."""
    download: bool = False
    """Fetch the dataset into data_dir if it is not there."""
    img_size: int = 224
    """Side of the input image."""
    train_batch_size: int = 64
    """Images per training step."""
    eval_batch_size: int = 64
    """Images per evaluation step."""
    eval_every: int = 3125
    """Steps between evaluations while training."""
    learning_rate: float = 3e-2
    """Peak learning rate of SGD."""
    weight_decay: float = 0.0
    """Of SGD."""
    num_steps: int = 10000
    """Training steps."""
    decay_type: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls."""
    warmup_steps: int = 1000
    """Steps until the learning rate is at its height."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    local_rank: int = -1
    """Accepted and not needed: torchrun tells every process its rank."""
    seed: int = 42
    """Of every random choice."""
    gradient_accumulation_steps: int = 1
    """Forward passes per step."""
    fp16: bool = False
    """Half precision."""
    fp16_opt_level: str = "O2"
    """Accepted and not needed: an option of apex, which is not used."""
    loss_scale: float = 0.0
    """Accepted and not needed: torch chooses the loss scale."""
    macs: float | None = None
    """Fraction of the dense MACs to spend (by default half of the patches are left at the end)."""
    resume: bool = False
    """Resume from the checkpoint in output_dir."""
    device: str = "auto"
    """auto, cpu, cuda ..."""


def seed_preprocessing(image_size: int) -> Preprocessing:
    """Resize to a square, mean = std = 0.5."""
    half = (0.5, 0.5, 0.5)
    size = (image_size, image_size)
    return Preprocessing(size, half, half, interpolation="bilinear", crop_pct=1.0, crop_mode="squash")


def run_eval(arguments: SeedArguments) -> None:
    """Evaluate a CIFAR checkpoint dense and pruned, as the original eval.py was meant to."""
    set_seed(arguments.seed)
    model = create_model(
        arguments.model_type, num_classes=CLASSES[arguments.dataset], image_size=arguments.img_size
    )
    say(load_checkpoint(model, arguments.pretrained_dir).summary())
    model.to(choose_device(arguments.device), choose_dtype("bfloat16" if arguments.fp16 else "float32"))
    source = find_samples(
        arguments.dataset, split="test", data_dir=arguments.data_dir, download=arguments.download
    )
    batches = make_loader(
        source,
        seed_preprocessing(arguments.img_size),
        labels=label_map(source, CLASSES[arguments.dataset]),
        batch_size=arguments.eval_batch_size,
    )
    result = evaluate(
        model,
        batches,
        PruneConfig(macs=arguments.macs, schedule="linear-ramp"),
        seed=arguments.seed,
        progress=progress,
    )
    print(f"{arguments.name}: {arguments.dataset}, {arguments.model_type}")
    print(eval_text(result))


SEED_CROP = (0.05, 1.0)
"""Part of the image's area that the original's random crop takes; its images are not flipped."""


def run_train(arguments: SeedArguments) -> None:
    """Finetune a pruned model on CIFAR, as the original train.py was meant to."""
    processes = start_processes(arguments.device, logging_dir=arguments.output_dir.expanduser())
    set_seed(arguments.seed)
    classes = CLASSES[arguments.dataset]
    model = create_model(arguments.model_type, num_classes=classes, image_size=arguments.img_size)
    report = load_checkpoint(model, arguments.pretrained_dir, replace_head=True)
    if processes.is_main:
        say(report.summary())
    train, test = _train_and_test(arguments, processes)
    result = finetune(
        model,
        train,
        test,
        seed_config(arguments),
        arguments.output_dir,
        pruning=PruneConfig(macs=arguments.macs, schedule="linear-ramp"),
        options=RunOptions(
            resume=arguments.resume,
            fingerprint={
                "dataset": arguments.dataset,
                "pretrained_dir": arguments.pretrained_dir.name,
                "img_size": arguments.img_size,
            },
            callback=CallbackList(ProgressBar(), TensorBoard(processes)),
        ),
        processes=processes,
    )
    if processes.is_main:
        print(f"{arguments.name}: {arguments.dataset}, {arguments.model_type}")
        print(finetune_text(result))
        say(f"models, checkpoint and record: {arguments.output_dir}")
    processes.part()


def seed_config(arguments: SeedArguments) -> FinetuneConfig:
    """The original's settings: SGD with momentum 0.9, linear warm-up, then a cosine or a line."""
    return FinetuneConfig(
        num_steps=arguments.num_steps,
        batch_size=arguments.train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        dtype="float16" if arguments.fp16 else "float32",
        eval_every=arguments.eval_every,
        checkpoint_every=arguments.eval_every,
        seed=arguments.seed,
        optimization=OptimizerConfig(
            optimizer="sgd",
            learning_rate=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            momentum=0.9,
            max_grad_norm=arguments.max_grad_norm,
            # A run shorter than the original's 1000 steps of warm-up ends within it.
            warmup_steps=min(arguments.warmup_steps, arguments.num_steps),
            decay=arguments.decay_type,
        ),
    )


def _train_and_test(arguments: SeedArguments, processes: Processes) -> tuple[TrainBatches, Batches]:
    prepared = seed_preprocessing(arguments.img_size)
    classes = CLASSES[arguments.dataset]
    train, test = (
        find_samples(arguments.dataset, split=split, data_dir=arguments.data_dir, download=arguments.download)
        for split in ("train", "test")
    )
    labels = label_map(train, classes)
    options = TrainLoaderOptions(
        batch_size=arguments.train_batch_size // arguments.gradient_accumulation_steps,
        seed=arguments.seed,
        augmentation=Augmentation(scale=SEED_CROP, flip=0.0),
        rank=processes.rank,
        world_size=processes.world_size,
    )
    batches = make_train_batches(train, prepared, options, labels=labels, num_classes=classes)
    return batches, make_loader(
        test,
        prepared,
        labels=labels,
        batch_size=arguments.eval_batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
    )
