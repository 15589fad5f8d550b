"""Images/s on one folder: ``cpvit predict`` next to what people use, in one run.

    python studies/bulk_comparison.py --checkpoint deit_tiny_patch16_224.safetensors --data images/ --batch-size 32

Rows, of DeiT-Tiny in float32 on this machine's processors:
    bare forward: batches in memory, nothing but the model; dense and pruned
    cpvit predict: files to Parquet; dense and pruned
    timm loop: what timm's inference.py does (create_dataset, create_loader, topk), to a CSV of pandas' kind
    embedding loop: what clip-retrieval's inference does: a DataLoader of files, the model, numpy arrays into .npy
    transformers.pipeline: image-classification over the files in batches, the same architecture in transformers

Every row runs ``--rounds`` times, in turn; the median and the range are printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from cpvit.commands.cli import main as cpvit
from cpvit.data import Preprocessing, find_samples, make_loader
from cpvit.plans.config import PruneConfig
from cpvit.pruning.prune import prune_
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint

MODEL = "deit_tiny_patch16_224"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder of class folders of JPEGs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--macs", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.data.rglob("*") if path.is_file())
    runs = contenders(arguments, files)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            told = run()
            seconds[name].append(time.perf_counter() - start if told is None else told)
            print(f"{name:>28}: {len(files) / seconds[name][-1]:8.1f} images/s", flush=True)
    rows = {name: [len(files) / value for value in found] for name, found in seconds.items()}
    print(f"\n{len(files)} images, batch {arguments.batch_size}, {torch.get_num_threads()} threads")
    for name, rates in rows.items():
        print(f"{name:>28}: {median(rates):8.1f} images/s ({min(rates):.1f} to {max(rates):.1f})")
    for kind in ("dense", "pruned"):
        overhead = median(rows[f"bare forward, {kind}"]) / median(rows[f"cpvit predict, {kind}"]) - 1
        print(f"{kind}: cpvit predict takes {100 * overhead:.1f}% longer than the bare forward")
    gain = {
        name: median(rows[f"{name}, pruned"]) / median(rows[f"{name}, dense"])
        for name in ("bare forward", "cpvit predict")
    }
    print(
        f"pruned over dense: bare forward {gain['bare forward']:.2f}x, end to end {gain['cpvit predict']:.2f}x"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"images": len(files), "images_per_s": rows}, indent=2) + "\n")


def contenders(arguments: argparse.Namespace, files: list[Path]) -> dict[str, Callable[[], float | None]]:
    """By name what to time; one that returns seconds has left its start-up out."""
    dense, pruned = built(arguments), built(arguments)
    prune_(pruned, PruneConfig(method="cpvit-merge", macs=arguments.macs))
    batch = first_batch(arguments, dense)
    budget = ["--method", "cpvit-merge", "--macs", str(arguments.macs)]
    return {
        "bare forward, dense": lambda: bare(dense, batch, len(files)),
        "bare forward, pruned": lambda: bare(pruned, batch, len(files)),
        "cpvit predict, dense": lambda: predict(arguments, ["--dense"]),
        "cpvit predict, pruned": lambda: predict(arguments, budget),
        "timm loop": lambda: timm_loop(arguments, dense),
        "embedding loop": lambda: embedding_loop(arguments, dense, files),
        "transformers.pipeline": pipeline(arguments, files),
    }


def built(arguments: argparse.Namespace) -> Any:
    model = create_model(MODEL).eval()
    load_checkpoint(model, arguments.checkpoint)
    return model


def first_batch(arguments: argparse.Namespace, model: Any) -> torch.Tensor:
    loader = make_loader(
        find_samples(arguments.data),
        Preprocessing.from_model(model),
        labels=None,
        batch_size=arguments.batch_size,
    )
    return next(iter(loader)).images


@torch.inference_mode()
def bare(model: Any, batch: torch.Tensor, count: int) -> float:
    model(batch)
    start = time.perf_counter()
    for first in range(0, count, len(batch)):
        model(batch[: count - first])
    return time.perf_counter() - start


def predict(arguments: argparse.Namespace, more: list[str]) -> float:
    """Seconds from the first image to the last file, as the command counts them."""
    out = Path(tempfile.mkdtemp())
    line = [
        "predict",
        "--model",
        MODEL,
        "--checkpoint",
        str(arguments.checkpoint),
        "--data",
        str(arguments.data),
    ]
    line += ["--out", str(out / "out"), "--json", str(out / "record.json"), "--device", "cpu"]
    line += ["--batch-size", str(arguments.batch_size), "--workers", str(arguments.workers), *more]
    status = cpvit(line)
    record = json.loads((out / "record.json").read_text())
    shutil.rmtree(out)
    if status or record["bad_images"]:
        raise RuntimeError(f"cpvit predict ended with {status}, {record['bad_images']} bad images")
    return float(record["seconds"])


@torch.inference_mode()
def timm_loop(arguments: argparse.Namespace, model: Any) -> None:
    from timm.data import create_dataset, create_loader, resolve_model_data_config

    config = resolve_model_data_config(model)
    dataset = create_dataset("", root=str(arguments.data), is_training=False)
    loader = create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=arguments.batch_size,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=arguments.workers,
        crop_pct=config["crop_pct"],
        device=torch.device("cpu"),
    )
    indices, probabilities = [], []
    for images, _ in loader:
        best = model(images).softmax(-1).topk(5)
        indices.append(best.indices.numpy())
        probabilities.append(best.values.numpy())
    with tempfile.TemporaryFile("w") as file:
        writer = csv.writer(file)
        for name, row, values in zip(
            dataset.filenames(basename=True),
            np.concatenate(indices),
            np.concatenate(probabilities),
            strict=True,
        ):
            writer.writerow([name, *row, *values])


class Files(torch.utils.data.Dataset):
    def __init__(self, files: list[Path], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, str]:
        return self.transform(Image.open(self.files[number]).convert("RGB")), str(self.files[number])


@torch.inference_mode()
def embedding_loop(arguments: argparse.Namespace, model: Any, files: list[Path]) -> None:
    loader = torch.utils.data.DataLoader(
        Files(files, Preprocessing.from_model(model).transform()),
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
    )
    found: list[Any] = []
    for images, _ in loader:
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        found.append((features / features.norm(dim=-1, keepdim=True)).half().numpy())
    with tempfile.TemporaryFile() as file:
        np.save(file, np.concatenate(found))


def pipeline(arguments: argparse.Namespace, files: list[Path]) -> Callable[[], None]:
    """DeiT-Tiny's architecture in transformers with random weights: the time does not depend on them."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=1000
    )
    classify = transformers.pipeline(
        "image-classification",
        model=transformers.ViTForImageClassification(config).eval(),
        image_processor=transformers.ViTImageProcessor(size={"height": 224, "width": 224}),
        device="cpu",
    )

    def run() -> None:
        for _ in classify(
            [str(file) for file in files], batch_size=arguments.batch_size, num_workers=0, top_k=5
        ):
            pass

    return run


if __name__ == "__main__":
    main()
