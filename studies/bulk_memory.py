"""Does memory stay flat over many images? Generates small images, runs predict and embed, and samples resident memory.

    python studies/bulk_memory.py --images 100000 --work /tmp/bulk-memory

Each run is a process of its own. The memory of it and of its loader workers is sampled five times a second, from the
first part on. Printed: after the warm-up (a tenth of the run) and at the end, each the median over a tenth of it.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

SIDE = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--per-shard", type=int, default=5000)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    shards = arguments.work / "shards"
    if not shards.exists():
        generate(shards, arguments.images, arguments.per_shard)
    weights = arguments.work / "tiny.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", img_size=SIDE, num_classes=10).state_dict(), weights)
    rows = [
        measure(arguments, verb, weights, shards) for verb in (["predict"], ["embed", "--features", "tokens"])
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def generate(folder: Path, count: int, per_shard: int) -> None:
    """Small JPEGs of noise in shards."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for first in range(0, count, per_shard):
        with tarfile.open(folder / f"{first // per_shard:06}.tar", "w") as archive:
            for number in range(first, min(first + per_shard, count)):
                buffer = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(buffer, "JPEG")
                member = tarfile.TarInfo(f"{number:08}.jpg")
                member.size = buffer.tell()
                buffer.seek(0)
                archive.addfile(member, buffer)


def measure(arguments: argparse.Namespace, verb: list[str], weights: Path, shards: Path) -> dict[str, object]:
    """One run in a process of its own."""
    out = arguments.work / verb[0]
    line = [*verb, "--model", "test_vit", "--image-size", str(SIDE), "--checkpoint", str(weights), "--resume"]
    line += [
        "--data",
        str(shards),
        "--out",
        str(out),
        "--dense",
        "--device",
        "cpu",
        "--rows-per-part",
        "2000",
    ]
    line += ["--workers", str(arguments.workers), "--batch-size", "64"]
    code = "from cpvit.commands.cli import entry_point; entry_point()"
    process = subprocess.Popen([sys.executable, "-c", code, *line], stdout=subprocess.PIPE, text=True)
    samples: list[int] = []
    while process.poll() is None:
        if list(out.glob("part-*")):
            samples.append(resident(process.pid))
        time.sleep(0.2)
    said = process.stdout.read() if process.stdout else ""
    tenth = max(1, len(samples) // 10)
    after, end = median(samples[tenth : 2 * tenth]), median(samples[-tenth:])
    row: dict[str, object] = {
        "run": " ".join(verb),
        "images": arguments.images,
        "status": process.returncode,
        "samples": len(samples),
        "after_warm_up_mb": after / 1e6,
        "at_the_end_mb": end / 1e6,
        "grown_mb": (end - after) / 1e6,
        "highest_mb": max(samples) / 1e6,
    }
    print(said.strip())
    print(row, flush=True)
    return row


def resident(pid: int) -> int:
    """Of a process and its children: memory of their own, without what the system caches of mapped files."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(one.memory_info().rss - one.memory_info().shared for one in processes)
    except psutil.Error:
        return 0


if __name__ == "__main__":
    main()
