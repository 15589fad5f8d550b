"""What a pruned image tower saves of a vision-language model's prefill: random weights, published shapes scaled down.

    python studies/vlm_prefill.py --family llava --shrink 4 --macs 0.8 0.6 0.4

Tower and text model get the published number of tokens, and 1/shrink of the published channels and layers, so that
the two keep their proportion. Times are of one image and a short prompt, dense and pruned in turn in one process:
"tower" is everything up to the tokens of the text model, "prefill" the whole forward that gives the first logits.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import cpvit
from cpvit.files import write_atomically
from cpvit.machine.environment import describe_environment
from cpvit.machine.timer import interleave

IMAGE_TOKEN, WORDS = 4, 1000


def text_values(shrink: int, width: int, layers: int, heads: int, groups: int, mlp: int) -> dict[str, Any]:
    return {
        "hidden_size": width // shrink,
        "num_hidden_layers": max(2, layers // shrink),
        "num_attention_heads": heads // shrink,
        "num_key_value_heads": max(1, groups // shrink),
        "intermediate_size": mlp // shrink,
        "vocab_size": WORDS,
        "head_dim": width // heads,
        "pad_token_id": 1,
    }


def tower_values(
    shrink: int, width: int, layers: int, heads: int, mlp: int, image: int, patch: int
) -> dict[str, Any]:
    return {
        "hidden_size": width // shrink,
        "num_hidden_layers": max(2, layers // shrink),
        "num_attention_heads": heads // shrink,
        "intermediate_size": mlp // shrink,
        "image_size": image,
        "patch_size": patch,
    }


def llava(shrink: int) -> Any:
    """LLaVA-1.5 7B: CLIP-L/14 at 336 pixels, 576 tokens; Llama 7B."""
    import transformers

    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**tower_values(shrink, 1024, 24, 16, 4096, 336, 14)),
            text_config=transformers.LlamaConfig(**text_values(shrink, 4096, 32, 32, 32, 11008)),
            image_token_id=IMAGE_TOKEN,
        )
    )


def paligemma(shrink: int) -> Any:
    """PaliGemma 3B at 448 pixels: SigLIP So400m/14, 1024 tokens; Gemma 2B."""
    import transformers

    tower = tower_values(shrink, 1152, 27, 16, 4304, 448, 14)
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower},
            text_config={"model_type": "gemma", **text_values(shrink, 2048, 18, 8, 1, 16384)},
            image_token_id=IMAGE_TOKEN,
            projection_dim=2048 // shrink,
        )
    )


def internvl(shrink: int) -> Any:
    """InternVL3 2B, one crop: InternViT 300M/14 at 448 pixels, 256 tokens; Qwen2.5 1.5B."""
    import transformers

    tower = tower_values(shrink, 1024, 24, 16, 4096, 448, 14)
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            vision_config={**tower, "image_size": [448, 448], "patch_size": [14, 14]},
            text_config={"model_type": "qwen2", **text_values(shrink, 1536, 28, 12, 2, 8960)},
            image_token_id=IMAGE_TOKEN,
        )
    )


FAMILIES: dict[str, Callable[[int], Any]] = {"llava": llava, "paligemma": paligemma, "internvl": internvl}


def sharing_weights(model: Any) -> Any:
    """The model once more, with the very same tensors."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def runs_of(model: Any, pixels: torch.Tensor, image_tokens: int, words: int) -> list[Callable[[], object]]:
    """The tower with its connector, and the prefill."""
    ids = torch.cat([torch.full((1, image_tokens), IMAGE_TOKEN), torch.randint(10, WORDS, (1, words))], dim=1)
    return [
        lambda: model.get_image_features(pixel_values=pixels),
        lambda: model(input_ids=ids, pixel_values=pixels, logits_to_keep=1),
    ]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="llava")
    parser.add_argument("--shrink", type=int, default=4, help="divides channels and layers")
    parser.add_argument("--method", default="cpvit-merge")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.8, 0.6, 0.4], help="of the tower")
    parser.add_argument("--words", type=int, default=32, help="of the prompt")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    torch.manual_seed(0)
    dense = FAMILIES[arguments.family](arguments.shrink).eval()
    models = [sharing_weights(dense) for _ in arguments.macs]
    prunings = [
        cpvit.prune_vlm_(model, cpvit.PruneConfig(method=arguments.method, macs=macs))
        for model, macs in zip(models, arguments.macs, strict=True)
    ]
    size = dense.config.vision_config.image_size
    pixels = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))
    runs = runs_of(dense, pixels, prunings[0].dense_image_tokens, arguments.words)
    for model, pruning in zip(models, prunings, strict=True):
        runs += runs_of(model, pixels, pruning.image_tokens, arguments.words)
    times = interleave(runs, torch.device("cpu"), arguments.seconds)
    rows = []
    names = ["dense", *(f"{arguments.method}, macs={macs}" for macs in arguments.macs)]
    tokens = [prunings[0].dense_image_tokens, *(pruning.image_tokens for pruning in prunings)]
    print(f"{arguments.family}, shapes divided by {arguments.shrink}, {len(times[0])} rounds in turn")
    print(
        f"{'':28}{'image tokens':>14}{'tower ms':>10}{'faster':>8}{'prefill ms':>12}{'faster':>8}{'p10':>7}{'p90':>7}"
    )
    for row, (name, count) in enumerate(zip(names, tokens, strict=True)):
        tower, prefill = times[2 * row], times[2 * row + 1]
        ratios = [one / other for one, other in zip(times[1], prefill, strict=True)]
        tower_ratio = median(one / other for one, other in zip(times[0], tower, strict=True))
        low, *_, high = quantiles(ratios, n=10)
        print(
            f"{name:28}{count:14d}{1e3 * median(tower):10.1f}{tower_ratio:7.2f}x{1e3 * median(prefill):12.1f}"
            f"{median(ratios):7.2f}x{low:6.2f}x{high:6.2f}x"
        )
        seconds = {"tower": [round(one, 5) for one in tower], "prefill": [round(one, 5) for one in prefill]}
        rows.append({"name": name, "image_tokens": count, **seconds})
    if arguments.json:
        environment = dataclasses.asdict(describe_environment(torch.device("cpu"), torch.float32, 0))
        asked = {name: value for name, value in vars(arguments).items() if name != "json"}
        record = {"arguments": asked, "rows": rows, "environment": environment}
        write_atomically(arguments.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
