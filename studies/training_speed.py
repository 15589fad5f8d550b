"""How fast is a training step, dense and pruned? Images a second of ``cpvit finetune``, decoding of images included.

    python studies/training_speed.py --data cifar10-jpeg.tar.gz

Random weights, which do not change the time. All take turns, some steps each, several rounds; medians. The dense model
is trained as timm builds it, and with attention that is not fused (``TIMM_FUSED_ATTN=0``): torch's fused attention is
slow backwards on a CPU, which would flatter pruned models.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timm.layers import set_fused_attn

from cpvit import PruneConfig
from cpvit.data import (
    Preprocessing,
    TrainLoaderOptions,
    find_samples,
    label_map,
    make_loader,
    make_train_batches,
)
from cpvit.files import write_atomically
from cpvit.finetune import FinetuneConfig, finetune
from cpvit.finetune.config import DtypeName
from cpvit.machine.environment import describe_environment
from cpvit.weights.create import create_model

DENSE = {"dense": True, "dense, attention not fused": False}
METHODS = (*DENSE, "cpvit", "cpvit-merge")
DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16")
CLASSES = 10


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--data", required=True, help="with train/ and test/")
    parser.add_argument("--macs", type=float, default=0.59)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="of each, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    settings = list(product(DTYPES, METHODS))
    speeds: dict[tuple[DtypeName, str], list[float]] = {setting: [] for setting in settings}
    for _ in range(arguments.rounds):
        for setting in settings:
            speeds[setting].append(images_per_s(arguments, *setting))
    rows = [
        {"dtype": dtype, "method": method, "images_per_s": [round(speed, 2) for speed in found]}
        for (dtype, method), found in speeds.items()
    ]
    for row in rows:
        print(f"{row['dtype']:10} {row['method']:26} {median(row['images_per_s']):7.1f} images/s")
    if arguments.json is not None:
        found = {
            "model": arguments.model,
            "macs": arguments.macs,
            "batch_size": arguments.batch_size,
            "rows": rows,
            "environment": dataclasses.asdict(
                describe_environment(torch.device("cpu"), torch.float32, seed=0)
            ),
        }
        write_atomically(arguments.json, json.dumps(found, indent=1) + "\n")


def images_per_s(arguments: Any, dtype: DtypeName, method: str) -> float:
    """Median over the steps of one short run."""
    set_fused_attn(DENSE.get(method, True))
    model = create_model(arguments.model, num_classes=CLASSES)
    train, test = (find_samples(arguments.data, split=split) for split in ("train", "test"))
    labels, preprocessing = label_map(train, CLASSES), Preprocessing.from_model(model)
    loading = TrainLoaderOptions(batch_size=arguments.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        return finetune(
            model,
            make_train_batches(train, preprocessing, loading, labels=labels, num_classes=CLASSES),
            make_loader(test.limited(1), preprocessing, labels=labels, batch_size=1),
            FinetuneConfig(num_steps=arguments.steps, batch_size=arguments.batch_size, dtype=dtype),
            Path(folder) / "run",
            pruning=None if method in DENSE else PruneConfig(method=method, macs=arguments.macs),
        ).images_per_s


if __name__ == "__main__":
    main()
