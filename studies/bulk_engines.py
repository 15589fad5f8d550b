"""One process, two under torchrun, two actors of Ray: the same images on the same processors.

    python studies/bulk_engines.py --checkpoint deit_tiny_patch16_224.safetensors --data "shards/{000000..000003}.tar"

``studies/bulk_memory.py --work FOLDER`` generates such shards. Each engine gets all processors: one process with all
threads, as many processes with one thread, as many actors with one. Seconds are those of the whole command, and what
it counts itself, from the first image to the last file. Engines run in turn, ``--rounds`` times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as parquet

SCRIPT = "from cpvit.commands.cli import entry_point\nentry_point()\n"
ENGINES = ("one process", "torchrun", "ray")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--macs", type=float, default=0.6)
    parser.add_argument("--processors", type=int, default=os.cpu_count())
    parser.add_argument("--rows-per-part", type=int, default=1024)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.engines}
    for _ in range(arguments.rounds):
        for name, found in rows.items():
            found.append(timed(name, arguments))
            print(name, found[-1], flush=True)
    for name, found in rows.items():
        whole, own = (median(row["images"] / row[key] for row in found) for key in ("seconds", "own_seconds"))
        print(f"{name:>12}: {whole:.1f} images/s of the whole command, {own:.1f} by its own count")
    if len({row["keys"] for found in rows.values() for row in found}) != 1:
        raise SystemExit("the engines did not write the same images")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def timed(engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    count = arguments.processors
    with tempfile.TemporaryDirectory() as folder:
        script, out, record = (Path(folder) / name for name in ("cpvit_main.py", "out", "record.json"))
        script.write_text(SCRIPT)
        start = [sys.executable]
        if engine == "torchrun":
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        line = ["predict", "--model", arguments.model, "--checkpoint", str(arguments.checkpoint)]
        line += ["--method", "cpvit-merge", "--macs", str(arguments.macs), "--data", arguments.data]
        line += ["--rows-per-part", str(arguments.rows_per_part), "--out", str(out), "--json", str(record)]
        if engine == "ray":
            line += ["--engine", "ray", "--actors", str(count), "--cpus-per-actor", "1"]
        threads = {} if engine == "one process" else {"OMP_NUM_THREADS": "1"}
        began = time.perf_counter()
        subprocess.run([*start, str(script), *line, "--quiet"], check=True, env={**os.environ, **threads})
        seconds = time.perf_counter() - began
        own = json.loads(record.read_text())
        keys = parquet.read_table(out, columns=["key"])["key"].to_pylist()
    return {
        "images": own["done"],
        "seconds": seconds,
        "own_seconds": own["seconds"],
        "keys": hash(tuple(sorted(keys))),
    }


if __name__ == "__main__":
    main()
