"""What the authors' released code would cost in accuracy, next to the dense model.

    python studies/released_code.py --checkpoint deit_tiny_patch16_224.safetensors --data imagenet-val-650.tar

It zeroes tokens and saves no time, so its budget is stated as equivalent MACs: what it would cost if a zeroed
token were truly absent. Its own schedule runs, and then with the ratios scaled to each budget of ``--macs``; both with
the counter that was meant and with the one that was released.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from cpvit.data import Batch, Preprocessing, find_samples, label_map, make_loader
from cpvit.files import write_atomically
from cpvit.machine.environment import describe_environment
from cpvit.measure.metrics import Predictions, agreement, kl_divergence
from cpvit.measure.outcomes import outcomes, right
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference import equivalent_macs, released_oracle

PROBE = 32
"""Images on which the scale for a budget is found (the released thresholds depend on the images)."""
COUNTERS = ("intended", "released")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", required=True, help="folder or tar of class folders")
    parser.add_argument(
        "--fresh", action="store_true", help="mend the released MLP threshold, taken too early"
    )
    parser.add_argument(
        "--macs", type=float, nargs="*", default=[0.6], help="shares of the dense MACs to scale to"
    )
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path)
    return parser


@torch.inference_mode()
def main() -> None:
    arguments = parser().parse_args()
    model: Any = create_model(arguments.model)
    load_checkpoint(model, arguments.checkpoint)
    source = find_samples(arguments.data).limited(arguments.limit)
    preprocessing = Preprocessing.from_model(model)
    labels = label_map(source, model.num_classes)
    batches = list(make_loader(source, preprocessing, labels=labels, batch_size=50))
    probe = make_loader(source.limited(PROBE), preprocessing, labels=None, batch_size=PROBE)
    images = next(iter(probe)).images
    dense = Predictions(
        torch.cat([model(batch.images) for batch in batches]).log_softmax(dim=-1),
        torch.cat([batch.labels for batch in batches if batch.labels is not None]),
    )
    print(f"{len(source)} images; dense top-1 {dense.top(1):.2f}, top-5 {dense.top(5):.2f}")
    points = []
    for macs in (None, *arguments.macs):
        for counter in COUNTERS:
            options = {"counter": counter, "stale": False if arguments.fresh else None}
            scale = 1.0 if macs is None else scale_for(model, images, macs, options)
            points.append({"counter": counter, "macs": macs} | point(model, batches, dense, scale, options))
            print(said(points[-1]), flush=True)
    if arguments.json is not None:
        found = record(arguments, len(source), dense, points)
        write_atomically(arguments.json, json.dumps(found, indent=1) + "\n")


def scale_for(model: Any, images: torch.Tensor, share: float, options: dict[str, Any]) -> float:
    """The scale of the ratios that spends this share of the dense MACs on these images."""
    low, high = 0.0, 32.0
    for _ in range(14):
        middle = (low + high) / 2
        out = released_oracle(model, images, scale=middle, **options)
        spent = share_of_dense(model, out.attention_tokens, out.ffn_tokens)
        low, high = (middle, high) if spent > share else (low, middle)
    return high


def share_of_dense(model: Any, attention_tokens: list[float], ffn_tokens: list[float]) -> float:
    every = [float(model.patch_embed.num_patches + model.num_prefix_tokens)] * len(model.blocks)
    return equivalent_macs(model, attention_tokens, ffn_tokens) / equivalent_macs(model, every, every)


def point(
    model: Any, batches: list[Batch], dense: Predictions, scale: float, options: dict[str, Any]
) -> dict[str, Any]:
    """The released code with one counter and one scale, on all images."""
    runs = [released_oracle(model, batch.images, scale=scale, **options) for batch in batches]
    sizes = [len(batch.images) for batch in batches]
    attended = mean_tokens([run.attention_tokens for run in runs], sizes)
    fed = mean_tokens([run.ffn_tokens for run in runs], sizes)
    pruned = Predictions(torch.cat([run.logits for run in runs]).log_softmax(dim=-1), dense.labels)
    return {
        "scale": scale,
        "macs_ratio": share_of_dense(model, attended, fed),
        "attention_tokens": attended,
        "mlp_tokens": fed,
        "top1": pruned.top(1),
        "top5": pruned.top(5),
        "agreement": agreement(dense, pruned),
        "kl": kl_divergence(dense, pruned),
        "outcomes": dataclasses.asdict(outcomes(dense, pruned)),
    }


def mean_tokens(batches: list[list[float]], sizes: list[int]) -> list[float]:
    return [
        sum(n * size for n, size in zip(block, sizes, strict=True)) / sum(sizes)
        for block in zip(*batches, strict=True)
    ]


def said(found: dict[str, Any]) -> str:
    return (
        f"counter {found['counter']}, ratios x {found['scale']:.3f}: equivalent MACs {found['macs_ratio']:.2%}, "
        f"top-1 {found['top1']:.2f}, top-5 {found['top5']:.2f}, agreement {found['agreement']:.4f}, "
        f"KL {found['kl']:.4f}"
    )


def record(
    arguments: argparse.Namespace, images: int, dense: Predictions, points: list[dict[str, Any]]
) -> dict[str, Any]:
    here = describe_environment(torch.device("cpu"), torch.float32, seed=0)
    return {
        "model": arguments.model,
        "images": images,
        "dense_top1": dense.top(1),
        "dense_right": right(dense),
        "points": points,
        "environment": dataclasses.asdict(here),
    }


if __name__ == "__main__":
    main()
