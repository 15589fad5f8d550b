"""The learning rate of every step, against tables worked out by hand.

All tables are for 8 steps, 2 of them warm-up, and a peak of 0.8: step s of the warm-up has 0.8 s / 2, and of the
six steps after it, step k has 0.8 (1 + cos(30° k)) / 2, or 0.8 (6 - k) / 6, or 0.8.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from finetuning import student, train
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cpvit.finetune import Callback, FinetuneConfig, OptimizerConfig
from cpvit.finetune.optimizer import make_optimizer, make_schedule

Decay = Literal["cosine", "linear", "constant"]
TABLES: dict[Decay, list[float]] = {
    "cosine": [0.0, 0.4, 0.8, 0.7464102, 0.6, 0.4, 0.2, 0.0535898],
    "linear": [0.0, 0.4, 0.8, 0.6666667, 0.5333333, 0.4, 0.2666667, 0.1333333],
    "constant": [0.0, 0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8],
}
LAYERS: dict[Decay, dict[str, list[float]]] = {
    "cosine": {
        "head.weight": [0.0, 0.4, 0.8, 0.7464102, 0.6, 0.4, 0.2, 0.0535898],
        "norm.weight": [0.0, 0.2, 0.4, 0.3732051, 0.3, 0.2, 0.1, 0.0267949],
        "blocks.2.mlp.fc1.weight": [0.0, 0.2, 0.4, 0.3732051, 0.3, 0.2, 0.1, 0.0267949],
        "blocks.1.attn.proj.bias": [0.0, 0.1, 0.2, 0.1866025, 0.15, 0.1, 0.05, 0.0133975],
        "blocks.0.norm1.weight": [0.0, 0.05, 0.1, 0.0933013, 0.075, 0.05, 0.025, 0.0066987],
        "patch_embed.proj.weight": [0.0, 0.025, 0.05, 0.0466506, 0.0375, 0.025, 0.0125, 0.0033494],
    },
    "linear": {
        "head.weight": [0.0, 0.4, 0.8, 0.6666667, 0.5333333, 0.4, 0.2666667, 0.1333333],
        "blocks.2.mlp.fc1.weight": [0.0, 0.2, 0.4, 0.3333333, 0.2666667, 0.2, 0.1333333, 0.0666667],
        "blocks.0.norm1.weight": [0.0, 0.05, 0.1, 0.0833333, 0.0666667, 0.05, 0.0333333, 0.0166667],
    },
    "constant": {
        "head.weight": [0.0, 0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8],
        "blocks.1.attn.proj.bias": [0.0, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
        "patch_embed.proj.weight": [0.0, 0.025, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05],
    },
}
"""With a layer decay of one half: the head, then half for the last block with the norm after it, and so on down."""
DECAYS: tuple[Decay, ...] = ("cosine", "linear", "constant")


def config_of(decay: Decay, *, layers: bool = False, **changes: Any) -> FinetuneConfig:
    optimization = OptimizerConfig(
        optimizer="sgd",
        learning_rate=0.8,
        weight_decay=0.0,
        max_grad_norm=0.01,  # small steps: the rates are looked at, not the learning
        warmup_steps=2,
        decay=decay,
        layer_decay=0.5 if layers else None,
    )
    config = FinetuneConfig(num_steps=8, batch_size=2, checkpoint_every=4, optimization=optimization)
    return dataclasses.replace(config, **changes)


@contextmanager
def recorded_rates(model: nn.Module) -> Iterator[dict[str, list[float]]]:
    """The rate of every parameter at every step of any optimizer, read when the optimizer takes its step."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates: dict[str, list[float]] = defaultdict(list)

    def read(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates[names[parameter]].append(group["lr"])

    hook = register_optimizer_step_pre_hook(read)
    try:
        yield rates
    finally:
        hook.remove()


@pytest.mark.parametrize("decay", DECAYS)
def test_the_schedule(decay: Decay) -> None:
    config = config_of(decay)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    schedule = make_schedule(optimizer, config)
    found = []
    for step in range(8):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(TABLES[decay], abs=1e-7)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_schedule_with_layer_decay(decay: Decay) -> None:
    model, config = student(), config_of(decay, layers=True)
    optimizer = make_optimizer(model, config.optimization)
    schedule = make_schedule(optimizer, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, list[float]] = defaultdict(list)
    for step in range(8):
        schedule.step_update(step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found[names[parameter]].append(group["lr"])
    for name, table in LAYERS[decay].items():
        assert found[name] == pytest.approx(table, abs=1e-7), name


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_trains_with_them(decay: Decay, accumulation: int, tmp_path: Path) -> None:
    model = student()
    with recorded_rates(model) as rates:
        result = train(tmp_path, config_of(decay, accumulation=accumulation), model=model)
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, found in rates.items():
        assert found == pytest.approx(TABLES[decay], abs=1e-7), name
    assert result.history["learning_rate"] == pytest.approx(TABLES[decay], abs=1e-7)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_run_trains_with_them_and_layer_decay(decay: Decay, tmp_path: Path) -> None:
    model = student()
    with recorded_rates(model) as rates:
        result = train(tmp_path, config_of(decay, layers=True), model=model)
    for name, table in LAYERS[decay].items():
        assert rates[name] == pytest.approx(table, abs=1e-7), name
    assert result.history["learning_rate"] == pytest.approx(TABLES[decay], abs=1e-7)


def test_a_resumed_run_trains_with_them(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_steps(self, logs: Any) -> None:
            if logs[-1].step == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, config_of("cosine"), callback=Stop())
    model = student()
    with recorded_rates(model) as rates:
        train(tmp_path, config_of("cosine"), model=model, resume=True)
    assert rates["head.weight"] == pytest.approx([0.6, 0.4, 0.2, 0.0535898], abs=1e-7)
