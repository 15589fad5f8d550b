"""The model card (README.md) of a saved model: how it was pruned, what it costs, how to load it."""

from __future__ import annotations

from collections.abc import Mapping

from cpvit.adapters import Host
from cpvit.machine.environment import package_version
from cpvit.plans.plan import Plan

CARD = "README.md"
MARK = "library_name: cpvit"
"""In the header of every card that cpvit wrote; one without it is somebody's own, and stays."""


def model_card(host: Host, plan: Plan, results: Mapping[str, float] | None = None, where: str = "") -> str:
    """Text of the card.

    Args:
        host: Pruned by ``plan``.
        plan: The active plan.
        results: Measured figures, by their names.
        where: Repository of the Hugging Face hub, if it goes there.
    """
    parameters = sum(parameter.numel() for parameter in host.model.parameters())
    heads = plan.heads_per_block
    cut = (
        "none"
        if heads == plan.num_heads
        else f"left in each block: {_list(heads)} of {_list(plan.num_heads)}"
    )
    made_with = package_version("cpvit") or "(from source)"
    source = f'"hf-hub:{where}"' if where else '"THIS_FOLDER"'
    rows = [
        ("model", f"{plan.model} ({host.family})"),
        ("method", f"{plan.method}, {plan.dial}, schedule {plan.schedule}"),
        ("tokens leaving each block", f"{_list(plan.tokens_per_block)} (of {host.num_tokens})"),
        ("heads", cut),
        ("MACs per image", f"{100 * plan.macs_ratio:.1f}% of the dense model's"),
        ("parameters", f"{parameters / 1e6:.2f} million"),
        ("image", " x ".join(str(side) for side in host.image_shape)),
        *((name, f"{value:g}") for name, value in (results or {}).items()),
    ]
    measured = (
        ""
        if results
        else "\nAccuracy was not measured when it was saved; `cpvit eval --model FOLDER` does.\n"
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
{MARK}
tags:
- vision-transformer
- token-pruning
- {plan.method}
---

# {plan.model}, pruned to {100 * plan.macs_ratio:.0f}% of the MACs

Saved by cpvit {made_with}: patches leave the Vision Transformer while it runs, so that later blocks see fewer.

| | |
|---|---|
{table}
{measured}
```python
from cpvit import load_pruned

model = load_pruned({source})  # in eval mode; model(images) prunes
```

`plan.json` is the plan (what leaves each block), `model.json` how the model is built, `model.safetensors` the weights.
"""


def _list(counts: tuple[int, ...]) -> str:
    return " ".join(str(count) for count in counts)
