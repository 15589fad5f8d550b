"""Where does a forward of one image spend its time, dense and pruned? Self times of torch's profiler, by kind.

    python studies/profile_forward.py --model deit_small_patch16_224 --macs 0.6

Random weights and one random image: neither changes the time. Dense and pruned take turns.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cpvit import PruneConfig, prune_
from cpvit.files import write_atomically
from cpvit.machine.environment import describe_environment
from cpvit.weights.create import create_model

KINDS = {
    "linear layers (`addmm`)": ("aten::addmm", "aten::linear", "aten::mm"),
    "attention (fused; or two batched products, softmax, maxima)": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_fused_attention",
        "aten::scaled_dot_product_attention",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_softmax",
        "aten::amax",
        "aten::max",
    ),
    "copies": ("aten::copy_", "aten::cat", "aten::index_select", "aten::gather", "aten::index"),
    "activations, norms, additions": (
        "aten::gelu",
        "aten::native_layer_norm",
        "aten::add",
        "aten::add_",
        "aten::mul",
        "aten::div",
    ),
}
REST = "everything else, mostly starting operations"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--method", default="cpvit")
    parser.add_argument("--macs", type=float, default=0.6)
    parser.add_argument("--forwards", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the times into this file")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    torch.manual_seed(0)
    dense = create_model(arguments.model).eval()
    pruned = copy.deepcopy(dense)
    plan = prune_(pruned, PruneConfig(method=arguments.method, macs=arguments.macs))
    size = dense.patch_embed.img_size
    times = in_turn((dense, pruned), torch.rand(1, 3, *size), arguments.forwards)
    found = {
        "model": arguments.model,
        "method": arguments.method,
        "macs_ratio": plan.macs_ratio,
        "forwards": arguments.forwards,
        "dense": times[0],
        "pruned": times[1],
        "environment": dataclasses.asdict(describe_environment(torch.device("cpu"), torch.float32, seed=0)),
    }
    for name, ms in times[0]["ms"].items():
        print(f"{name:60} {ms:7.1f} ms dense {times[1]['ms'][name]:7.1f} ms pruned")
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(found, indent=1) + "\n")


@torch.inference_mode()
def in_turn(models: Sequence[nn.Module], images: Tensor, forwards: int) -> list[dict[str, Any]]:
    """Milliseconds of self time per forward by kind, and operations started per forward, of each model.

    Ten turns, after a warm-up: a slow moment of the machine hits all models.
    """
    for model in models:
        for _ in range(5):
            model(images)
    turns, share = 10, max(1, forwards // 10)
    totals: list[dict[str, float]] = [dict.fromkeys((*KINDS, REST), 0.0) for _ in models]
    started = [0 for _ in models]
    for _ in range(turns):
        for number, model in enumerate(models):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                for _ in range(share):
                    model(images)
            for event in seen.key_averages():
                totals[number][kind(event.key)] += event.self_cpu_time_total / 1000
                started[number] += event.count
    runs = turns * share
    return [
        {"ms": {name: value / runs for name, value in total.items()}, "operations": round(count / runs)}
        for total, count in zip(totals, started, strict=True)
    ]


def kind(operation: str) -> str:
    return next((name for name, operations in KINDS.items() if operation in operations), REST)


if __name__ == "__main__":
    main()
