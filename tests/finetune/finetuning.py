"""A tiny model, tiny images and a run of the two; also imported by processes that tests start and kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import IMAGE, tiny_vit
from torch import nn

from cpvit import Plan, PruneConfig
from cpvit.data import Batches, ImageSource, Preprocessing, make_loader
from cpvit.data.cifar import ArrayReader
from cpvit.data.records import make_source
from cpvit.data.training import Augmentation, Mixing, TrainBatches, TrainLoaderOptions, make_train_batches
from cpvit.finetune import (
    FinetuneConfig,
    FinetuneResult,
    OptimizerConfig,
    Processes,
    RunOptions,
    finetune,
    start_processes,
)

CLASSES = ("ant", "bee", "cat")
LABELS = {name: number for number, name in enumerate(CLASSES)}
PREPARED = Preprocessing(IMAGE, (0.5,) * 3, (0.25,) * 3, crop_pct=1.0, crop_mode="squash")
PRUNING = PruneConfig(method="cpvit-merge", keep_per_block=(25, 16, 8))
SGD = OptimizerConfig(optimizer="sgd", learning_rate=0.05, weight_decay=0.0)


def student(seed: int = 0, **overrides: Any) -> nn.Module:
    return tiny_vit(seed=seed, num_classes=len(CLASSES), **overrides).float()


def pictures(count: int = 8, *, seed: int = 0, split: str = "train") -> ImageSource:
    """Noise with a brightness per class, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    names = [(name, f"{split}/{name}/{number}") for name in CLASSES for number in range(count)]
    arrays = {
        key: generator.integers(LABELS[name] * 60, LABELS[name] * 60 + 120, (*IMAGE, 3)).astype(np.uint8)
        for name, key in names
    }
    return make_source(
        "toy", [key for _, key in names], [name for name, _ in names], ArrayReader(arrays), split=split
    )


def train_batches(
    batch_size: int,
    *,
    processes: Processes,
    mixing: Mixing | None = None,
    augmented: bool = True,
    seed: int = 0,
) -> TrainBatches:
    options = TrainLoaderOptions(
        batch_size=batch_size,
        seed=seed,
        augmentation=Augmentation(random_resized_crop=augmented),
        mixing=mixing or Mixing(),
        rank=processes.rank,
        world_size=processes.world_size,
    )
    return make_train_batches(pictures(), PREPARED, options, labels=LABELS, num_classes=len(CLASSES))


def eval_batches(*, processes: Processes, batch_size: int = 5) -> Batches:
    return make_loader(
        pictures(6, seed=9, split="test"),
        PREPARED,
        labels=LABELS,
        batch_size=batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
    )


def train(
    folder: Path,
    config: FinetuneConfig,
    *,
    model: nn.Module | None = None,
    mixing: Mixing | None = None,
    pruning: PruneConfig | Plan | None = PRUNING,
    trained_by: Processes | None = None,
    **options: Any,
) -> FinetuneResult:
    """One run from the same start every time, on the images of one process; ``options`` are those of RunOptions."""
    torch.manual_seed(0)
    processes = start_processes("cpu")
    return finetune(
        student() if model is None else model,
        train_batches(config.micro_batch_size, processes=processes, mixing=mixing, seed=config.seed),
        eval_batches(processes=processes),
        config,
        folder,
        pruning=pruning,
        options=RunOptions(**options),
        processes=trained_by or processes,
    )
