"""How pruning changes retrieval: are the nearest images by pruned embeddings those that the dense model finds?

    python studies/retrieval.py --checkpoint deit_tiny_patch16_224.safetensors \\
        --data imagenet-val-650.tar --data cifar10-jpeg.tar.gz --limit 2000

For every image the ten nearest others (cosine) among all images. Recall@10: share of the dense model's that pruned
embeddings find, queries and gallery both pruned; "mixed": pruned queries in a gallery of dense embeddings.
Precision@10: share of the ten with the query's class. The embeddings are made as ``cpvit embed`` makes them, at the
same MACs for each feature; means of patches get a plan that keeps patches to the last block. Of a model that classifies
by its class token "pooled" is "class".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cpvit.adapters import Host, open_host
from cpvit.bulk.features import FeatureReader, Kind
from cpvit.data import Batches, ImageSource, Preprocessing, find_samples, make_loader
from cpvit.data.decoded import DecodedBatches, decoded_once
from cpvit.plans.config import PruneConfig
from cpvit.pruning.prune import prune_host
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint

NEAREST = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--limit", type=int, default=2000, help="of each source")
    parser.add_argument("--methods", nargs="+", default=["cpvit-merge", "cpvit", "tome"])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.6, 0.5])
    parser.add_argument(
        "--features", nargs="+", default=["class", "mean"], choices=["pooled", "class", "mean"]
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    preprocessing = Preprocessing.from_model(create_model(arguments.model))
    sources = [find_samples(data).limited(arguments.limit) for data in arguments.data]
    classes = torch.cat([_classes(source, 1000 * number) for number, source in enumerate(sources)])
    rows: list[dict[str, object]] = []
    with _Decoded(sources, preprocessing) as images:
        dense = {kind: embed(arguments, kind, None, images) for kind in arguments.features}
        for kind, values in dense.items():
            show(rows, method="dense", macs=1.0, features=kind, precision=precision(values, values, classes))
        for macs in arguments.macs:
            for method in arguments.methods:
                for kind in arguments.features:
                    found = embed(arguments, kind, PruneConfig(method=method, macs=macs), images)
                    show(
                        rows,
                        method=method,
                        macs=macs,
                        features=kind,
                        recall=recall(dense[kind], found, found),
                        mixed=recall(dense[kind], found, dense[kind]),
                        precision=precision(found, found, classes),
                    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"images": len(classes), "rows": rows}, indent=2) + "\n")


def show(rows: list[dict[str, object]], **row: object) -> None:
    rows.append(row)
    texts = (
        f"{name} {value:.4f}" if isinstance(value, float) else f"{value:>12}" for name, value in row.items()
    )
    print("  ".join(texts), flush=True)


def _classes(source: ImageSource, first: int) -> Tensor:
    names = sorted(set(source.class_names), key=str)
    return torch.tensor([first + names.index(name) for name in source.class_names])


class _Decoded:
    """All sources, decoded once."""

    def __init__(self, sources: list[ImageSource], preprocessing: Preprocessing) -> None:
        self._contexts = [decoded_once(_loader(source, preprocessing), preprocessing) for source in sources]
        self.batches: list[DecodedBatches] = []

    def __enter__(self) -> list[DecodedBatches]:
        return [context.__enter__() for context in self._contexts]

    def __exit__(self, *error: object) -> None:
        for context in self._contexts:
            context.__exit__(None, None, None)


def _loader(source: ImageSource, preprocessing: Preprocessing) -> Batches:
    return make_loader(source, preprocessing, labels=None, batch_size=50)


@torch.inference_mode()
def embed(
    arguments: argparse.Namespace, kind: Kind, config: PruneConfig | None, images: list[DecodedBatches]
) -> Tensor:
    """Normalised embeddings [N C]."""
    start = time.perf_counter()
    host = _opened(arguments)
    if config is not None:
        reads_patches = kind in ("mean", "tokens")
        reader = dataclasses.replace(host, discards_patches=host.discards_patches and not reads_patches)
        prune_host(reader, config)
    features = FeatureReader(host, kind)
    found: list[Tensor] = []
    for batch in (batch for source in images for batch in source):
        host.model(batch.images)
        taken = features.take()
        assert isinstance(taken, Tensor), "one vector an image"
        found.append(taken)
    print(f"    {time.perf_counter() - start:.0f} s", flush=True)
    return F.normalize(torch.cat(found), dim=1)


def _opened(arguments: argparse.Namespace) -> Host:
    model = create_model(arguments.model).eval()
    load_checkpoint(model, arguments.checkpoint)
    return open_host(model)


def nearest(queries: Tensor, gallery: Tensor) -> Tensor:
    """The ten nearest others [N 10]."""
    similarity = queries @ gallery.T
    similarity.fill_diagonal_(-2)
    return similarity.topk(NEAREST, dim=1).indices


def recall(dense: Tensor, queries: Tensor, gallery: Tensor) -> float:
    """Share of the dense model's ten that are found."""
    wanted, found = nearest(dense, dense), nearest(queries, gallery)
    return (wanted[:, :, None] == found[:, None, :]).any(dim=2).float().mean().item()


def precision(queries: Tensor, gallery: Tensor, classes: Tensor) -> float:
    """Share of the ten that are of the query's class."""
    return (classes[nearest(queries, gallery)] == classes[:, None]).float().mean().item()


if __name__ == "__main__":
    main()
