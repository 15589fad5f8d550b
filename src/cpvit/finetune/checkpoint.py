"""The state of a training run in one file: a reader, or a kill at any moment, meets the old one or the new one.

safetensors, no pickle: tensors as they are, everything else as JSON in the header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from cpvit.files import os_errors, remove_leftovers, replacing

VERSION = 1
"""Of the file's layout."""

_MODEL, _EMA, _OPTIMIZER, _HISTORY = "model.", "ema.", "optimizer.", "history"


@dataclass(frozen=True)
class Evaluation:
    """Accuracy at one point of the run."""

    step: int
    """Steps done before it."""
    top1: float
    """Percent."""
    top5: float
    """Percent."""
    loss: float
    """Mean cross-entropy, in nats."""
    images: int


@dataclass
class TrainingState:
    """What a run needs to be resumed after ``step`` steps."""

    step: int
    fingerprint: dict[str, Any]
    """What the run was started with (:mod:`cpvit.finetune.fingerprint`); a resumed run must have the same."""
    plan: str | None
    """JSON of the plan; None for dense."""
    model: dict[str, Tensor]
    optimizer: dict[int, dict[str, Any]]
    """Per parameter, as in the optimizer's state_dict."""
    history: Tensor
    """float64, a row per step."""
    ema: dict[str, Tensor] | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    """Of the gradient scaler."""
    evaluations: tuple[Evaluation, ...] = ()
    seconds: float = 0.0
    """Time spent in training steps so far."""


def save_state(path: Path, state: TrainingState) -> None:
    """Write the state; the old file stays until the new one is complete.

    Raises:
        OSError: It cannot be written (disk full ...). The old file is untouched and nothing is left beside it.
    """
    tensors, numbers = _split(state.optimizer)
    content = {
        **_prefixed(_MODEL, state.model),
        **_prefixed(_EMA, state.ema or {}),
        **_prefixed(_OPTIMIZER, tensors),
        _HISTORY: state.history,
    }
    rest = {
        "version": VERSION,
        "step": state.step,
        "facts": state.fingerprint,
        "plan": state.plan,
        "optimizer": numbers,
        "ema": state.ema is not None,
        "scaler": state.scaler,
        "evaluations": [asdict(evaluation) for evaluation in state.evaluations],
        "seconds": state.seconds,
    }
    with replacing(path) as temporary, os_errors():
        save_file({name: _plain(tensor) for name, tensor in content.items()}, temporary, _metadata(rest))


def load_state(path: Path) -> TrainingState:
    """Read :func:`save_state`; tensors on the CPU.

    Raises:
        ValueError: The file is damaged, or of a later version.
    """
    remove_leftovers(path)
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            rest = json.loads((opened.metadata() or {})["state"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 -- not a dict
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of a finetuning run ({error})") from None
    if rest["version"] > VERSION:
        raise ValueError(
            f"{path} has version {rest['version']}, newer than this cpvit reads ({VERSION}); upgrade cpvit"
        )
    return TrainingState(
        step=rest["step"],
        fingerprint=rest["facts"],
        plan=rest["plan"],
        model=_below(_MODEL, tensors),
        optimizer=_joined(_below(_OPTIMIZER, tensors), rest["optimizer"]),
        history=tensors[_HISTORY],
        ema=_below(_EMA, tensors) if rest["ema"] else None,
        scaler=rest["scaler"],
        evaluations=tuple(Evaluation(**values) for values in rest["evaluations"]),
        seconds=rest["seconds"],
    )


def _metadata(rest: dict[str, Any]) -> dict[str, str]:
    return {"format": "pt", "state": json.dumps(rest)}


def _plain(tensor: Tensor) -> Tensor:
    """A tensor of its own: safetensors refuses those that share memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _split(optimizer: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors and its plain numbers, as ``<parameter>.<name>``."""
    flat = {f"{number}.{name}": value for number, part in optimizer.items() for name, value in part.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def _joined(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    joined: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        number, name = key.split(".", 1)
        joined.setdefault(int(number), {})[name] = value
    return joined
