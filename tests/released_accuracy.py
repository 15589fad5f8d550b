"""What the authors' released code would cost in accuracy, next to the dense model: one line of numbers.

    python tests/released_accuracy.py --checkpoint deit_tiny.safetensors --data imagenet-val.tar

It zeroes tokens and saves no time, so its budget is stated as equivalent MACs: what it would cost if a zeroed
token were truly absent. Without ``--macs`` its own schedule runs; with it, the ratios are scaled to that budget.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from reference import equivalent_macs, released_oracle

from cpvit.data import Preprocessing, find_samples, label_map, make_loader
from cpvit.measure.metrics import Predictions, agreement, kl_divergence
from cpvit.weights.create import create_model
from cpvit.weights.loading import load_checkpoint

PROBE = 32
"""Images on which the scale for a budget is found (the released thresholds depend on the images)."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, help="folder or tar of class folders")
    parser.add_argument("--counter", choices=["intended", "released"], default="intended")
    parser.add_argument(
        "--fresh", action="store_true", help="mend the released MLP threshold, taken too early"
    )
    parser.add_argument("--macs", type=float, help="scale the ratios to this share of the dense MACs")
    parser.add_argument("--limit", type=int)
    return parser.parse_args()


def share_of_dense(model: Any, attention_tokens: list[float], ffn_tokens: list[float]) -> float:
    every = [float(model.patch_embed.num_patches + model.num_prefix_tokens)] * len(model.blocks)
    return equivalent_macs(model, attention_tokens, ffn_tokens) / equivalent_macs(model, every, every)


def scale_for(model: Any, images: torch.Tensor, share: float, options: dict[str, Any]) -> float:
    """The scale of the ratios that spends this share of the dense MACs on these images."""
    low, high = 0.0, 32.0
    for _ in range(14):
        middle = (low + high) / 2
        out = released_oracle(model, images, scale=middle, **options)
        spent = share_of_dense(model, out.attention_tokens, out.ffn_tokens)
        low, high = (middle, high) if spent > share else (low, middle)
    return high


def mean_tokens(batches: list[list[float]], sizes: list[int]) -> list[float]:
    return [
        sum(n * size for n, size in zip(block, sizes, strict=True)) / sum(sizes)
        for block in zip(*batches, strict=True)
    ]


@torch.inference_mode()
def main() -> None:
    arguments = parse()
    model: Any = create_model(arguments.model)
    load_checkpoint(model, arguments.checkpoint)
    source = find_samples(arguments.data)
    labels = label_map(source, model.num_classes)
    batches = make_loader(
        source.limited(arguments.limit), Preprocessing.from_model(model), labels=labels, batch_size=50
    )
    options = {"counter": arguments.counter, "stale": False if arguments.fresh else None}
    scale = 1.0
    if arguments.macs is not None:
        probe = make_loader(
            source.limited(PROBE), Preprocessing.from_model(model), labels=None, batch_size=PROBE
        )
        scale = scale_for(model, next(iter(probe)).images, arguments.macs, options)

    dense_logits, pruned_logits, truth, attention_tokens, ffn_tokens = [], [], [], [], []
    for batch in batches:
        out = released_oracle(model, batch.images, scale=scale, **options)
        dense_logits.append(model(batch.images))
        pruned_logits.append(out.logits)
        truth.append(batch.labels)
        attention_tokens.append(out.attention_tokens)
        ffn_tokens.append(out.ffn_tokens)

    sizes = [len(part) for part in truth]
    attended, fed = mean_tokens(attention_tokens, sizes), mean_tokens(ffn_tokens, sizes)
    dense, pruned = (
        Predictions(torch.cat(logits).log_softmax(dim=-1), torch.cat(truth))
        for logits in (dense_logits, pruned_logits)
    )
    print(f"counter {arguments.counter}, ratios x {scale:.3f}, {sum(sizes)} images")
    print(f"equivalent MACs  {100 * share_of_dense(model, attended, fed):.2f}% of dense")
    print(f"attention tokens {' '.join(f'{count:.0f}' for count in attended)}")
    print(f"MLP tokens       {' '.join(f'{count:.0f}' for count in fed)}")
    print(f"dense            top-1 {dense.top(1):.2f}, top-5 {dense.top(5):.2f}")
    print(f"released code    top-1 {pruned.top(1):.2f}, top-5 {pruned.top(5):.2f}")
    print(f"agreement {agreement(dense, pruned):.4f}, KL {kl_divergence(dense, pruned):.4f} nats")


if __name__ == "__main__":
    main()
