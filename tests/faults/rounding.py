"""How far random models of the property campaign move by themselves:  python -m tests.faults.rounding 5063 5117

Per seed, of the untouched model in float64 and the image of the check before pruning, as a share of the largest output:
how far the cascade with everything kept is away, how far the model itself moves when the image changes by one unit in
the last place (the smallest of five draws) and when its attention is not fused, and the largest difference of a single
block with and without fused attention, on the same tokens.
"""

from __future__ import annotations

import copy
import random
import sys
from typing import Any

import torch
from torch import Tensor

from cpvit import verify
from cpvit.pruning.verify import relative_error
from tests.faults.properties import random_model, run


def moves(model: Any) -> dict[str, float]:
    """What the module says, by name."""
    size = (1, 3, *model.patch_embed.img_size)
    image = torch.randn(size, generator=torch.Generator().manual_seed(0)).double()
    output, plain = run(model, image), copy.deepcopy(model)
    for block in plain.blocks:
        block.attn.fused_attn = False
    inputs: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in model.blocks
    ]
    run(model, image)
    for hook in hooks:
        hook.remove()
    blocks = zip(model.blocks, plain.blocks, inputs, strict=True)
    return {
        "cascade": verify(model).error,
        "last place": min(relative_error(run(model, nudged(image, seed)), output) for seed in range(5)),
        "attention unfused": relative_error(run(plain, image), output),
        "one block unfused": max(relative_error(run(other, x), run(one, x)) for one, other, x in blocks),
    }


def nudged(image: Tensor, seed: int) -> Tensor:
    """Every value up or down by one unit in the last place."""
    up = torch.rand(image.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    towards = torch.where(up, float("inf"), -float("inf")).to(image)
    return torch.nextafter(image, towards)


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:]):
        found = moves(random_model(random.Random(seed)).double().eval())
        print(f"seed {seed}: " + ", ".join(f"{name} {error:.1e}" for name, error in found.items()))
