"""Half of the patches gone, at most a point lost, *with* finetuning: trained models on the same test images.

    python studies/finetuned_claim.py --data cifar10-jpeg.tar.gz --start cifar10/last --control ft-control/last \
        --pruned ft-cpvit59/last ft-merge59/last

The folders are those that ``cpvit finetune`` writes. All but ``--start`` were trained from it, for as long, on the same
augmented images; the control with nothing pruned. Their records must say so, else nothing is compared. Every image is
decoded once and goes through all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpvit.data import Preprocessing, find_samples, label_map, make_loader
from cpvit.files import write_atomically
from cpvit.machine.environment import describe_environment
from cpvit.measure.metrics import Predictions
from cpvit.measure.outcomes import right
from cpvit.pruning.opening import open_as_it_is
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint
from cpvit.weights.saving import load_pruned

CLASSES = 10


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--data", required=True)
    parser.add_argument("--start", type=Path, required=True, help="folder of the dense model all began with")
    parser.add_argument("--control", type=Path, required=True, help="folder of the dense model trained on")
    parser.add_argument("--pruned", type=Path, nargs="+", required=True, help="folders of pruned models")
    parser.add_argument("--limit", type=int, help="so many test images")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    dtype = getattr(torch, arguments.dtype)
    trained_alike(arguments.control, arguments.pruned)
    dense = {name: trained(arguments.model, getattr(arguments, name)) for name in ("start", "control")}
    pruned = [load_pruned(folder) for folder in arguments.pruned]
    found = predictions([*dense.values(), *pruned], arguments.data, arguments.limit, dtype)
    rows = [{"name": name, **figures(one)} for name, one in zip(dense, found, strict=False)]
    points = [
        {**planned(model), **figures(one)} for model, one in zip(pruned, found[len(rows) :], strict=True)
    ]
    for row in (*rows, *points):
        print(
            row.get("name") or f"{row['method']} at {row['macs_ratio']:.1%} of the MACs", f"{row['top1']:.2f}"
        )
    if arguments.json is not None:
        here = describe_environment(torch.device("cpu"), dtype, seed=0)
        record = {
            "model": arguments.model,
            "images": len(found[0].log_probs),
            "dense": rows,
            "points": points,
            "environment": dataclasses.asdict(here),
        }
        write_atomically(arguments.json, json.dumps(record, indent=1) + "\n")


def trained_alike(control: Path, pruned: list[Path]) -> None:
    """Compare what decided the outcome of the runs, but for what was pruned.

    Raises:
        SystemExit: They differ.
    """
    expected = facts(control)
    for folder in pruned:
        found = facts(folder)
        other = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
        if other:
            raise SystemExit(f"{folder} was trained otherwise than {control}: {', '.join(other)}")


def facts(folder: Path) -> dict[str, Any]:
    """What decided the outcome of the run that left this folder, but for what was pruned."""
    found = json.loads((folder.resolve().parent / "record.json").read_text())["facts"]
    return {name: value for name, value in found.items() if name != "pruning"}


def trained(name: str, folder: Path) -> nn.Module:
    model = create_model(name, num_classes=CLASSES)
    load_checkpoint(model, folder / "model.safetensors")
    return model.eval()


@torch.inference_mode()
def predictions(
    models: list[nn.Module], data: str, limit: int | None, dtype: torch.dtype
) -> list[Predictions]:
    """Of every model for every test image."""
    source = find_samples(data, split="test").limited(limit)
    loader = make_loader(
        source, Preprocessing.from_model(models[0]), labels=label_map(source, CLASSES), batch_size=100
    )
    models = [model.to(dtype) for model in models]
    outputs: list[list[torch.Tensor]] = [[] for _ in models]
    labels = []
    for batch in loader:
        images = batch.images.to(dtype)
        labels.append(batch.labels)
        for model, rows in zip(models, outputs, strict=True):
            rows.append(model(images).float().log_softmax(dim=-1))
    truth = torch.cat(labels)
    return [Predictions(torch.cat(rows), truth) for rows in outputs]


def figures(found: Predictions) -> dict[str, Any]:
    return {"top1": found.top(1), "right": right(found)}


def planned(model: nn.Module) -> dict[str, Any]:
    container = open_as_it_is(model)[1]
    assert container is not None
    plan = container.plan
    return {
        "method": plan.method,
        "macs_ratio": plan.macs_ratio,
        "num_patches": plan.num_patches,
        "patches_per_block": list(plan.patches_per_block),
    }


if __name__ == "__main__":
    main()
