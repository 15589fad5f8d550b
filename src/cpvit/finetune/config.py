"""How a model is finetuned: frozen values that refuse what makes no sense."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
Freeze: TypeAlias = Literal["none", "embed", "all-but-head", "all-but-norm-and-head"]

WARMUP_SHARE = 20
"""By default one step in this many is a warm-up step."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate over the steps."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd (with momentum, not Nesterov's; its weight decay also covers biases and norms)."""
    learning_rate: float = 1e-4
    """Peak value, reached after the warm-up."""
    weight_decay: float = 0.05
    """Of weights; with adamw not of biases, norms and embeddings."""
    layer_decay: float | None = None
    """Factor on the learning rate per block below the head, e.g. 0.75 (timm's models only)."""
    momentum: float = 0.9
    """Of sgd."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm."""
    warmup_steps: int | None = None
    """Steps until the learning rate reaches its peak; by default a twentieth of all."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after that; cosine and linear fall to 0."""

    def __post_init__(self) -> None:
        _check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        _check_choice("decay", self.decay, ("cosine", "linear", "constant"))
        _check_number("learning_rate", self.learning_rate, above=0)
        _check_number("weight_decay", self.weight_decay, least=0)
        _check_number("layer_decay", self.layer_decay, above=0, most=1)
        _check_number("momentum", self.momentum, least=0, below=1)
        _check_number("max_grad_norm", self.max_grad_norm, above=0)
        _check_count("warmup_steps", self.warmup_steps, least=0)

    def warmup_of(self, num_steps: int) -> int:
        """Steps of warm-up in a run of ``num_steps``."""
        return num_steps // WARMUP_SHARE if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class DistillationConfig:
    """Learning from a dense teacher beside the labels."""

    distill: float = 0.0
    """Weight of the distillation loss against that of the labels, 0 to 1."""
    temperature: float = 1.0
    """The logits of teacher and student are divided by it in the distillation loss."""
    distill_features: float = 0.0
    """Weight of the loss on the features that the teacher's classifier reads (the class token)."""

    def __post_init__(self) -> None:
        _check_number("distill", self.distill, least=0, most=1)
        _check_number("temperature", self.temperature, above=0)
        _check_number("distill_features", self.distill_features, least=0)

    @property
    def wanted(self) -> bool:
        """Whether a teacher is needed."""
        return self.distill > 0 or self.distill_features > 0


@dataclass(frozen=True)
class TighteningConfig:
    """Gradual pruning: it starts with nothing pruned and reaches the plan in stages."""

    tighten_steps: int = 0
    """Steps after which the plan is active; until then less is pruned."""
    tighten_stages: int = 4
    """Number of stages of gradual pruning."""

    def __post_init__(self) -> None:
        _check_count("tighten_steps", self.tighten_steps, least=0)
        _check_count("tighten_stages", self.tighten_stages, least=1)


@dataclass(frozen=True)
class FreezeConfig:
    """Parameters that keep their values."""

    freeze: Freeze = "none"
    """none; embed (patch and position embedding, prefix tokens); all-but-head; all-but-norm-and-head."""
    freeze_blocks: int = 0
    """The first so many blocks, and the embedding before them."""

    def __post_init__(self) -> None:
        _check_choice("freeze", self.freeze, Freeze.__args__)  # type: ignore[attr-defined]
        _check_count("freeze_blocks", self.freeze_blocks, least=0)


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides what comes out of a run, but for the model, its plan and the images."""

    num_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Images per step in each process."""
    accumulation: int = 1
    """Forward passes that share a step; each takes batch-size / accumulation images."""
    dtype: DtypeName = "float32"
    """Of the arithmetic (autocast); the weights stay float32."""
    ema_decay: float | None = None
    """Evaluate and save a moving average of the weights, with this decay (warmed up), e.g. 0.999."""
    checkpointing: bool = False
    """Compute each block again in the backward pass: less memory, more time."""
    eval_every: int | None = None
    """Steps between evaluations; by default only at the end."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; by default ten in all."""
    seed: int = 0
    """Of every random choice."""
    optimization: OptimizerConfig = field(default_factory=OptimizerConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    tightening: TighteningConfig = field(default_factory=TighteningConfig)
    freezing: FreezeConfig = field(default_factory=FreezeConfig)

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, DtypeName.__args__)  # type: ignore[attr-defined]
        for name in ("num_steps", "batch_size", "accumulation", "eval_every", "checkpoint_every"):
            _check_count(name, getattr(self, name), least=1)
        _check_count("seed", self.seed, least=0)
        _check_number("ema_decay", self.ema_decay, above=0, below=1)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulation} equal parts (accumulation); "
                "give a multiple"
            )
        self._check_steps("warmup_steps", self.optimization.warmup_steps)
        self._check_steps("tighten_steps", self.tightening.tighten_steps)

    def _check_steps(self, name: str, steps: int | None) -> None:
        if steps is not None and steps > self.num_steps:
            raise ValueError(
                f"{name} is {steps}, more than the {self.num_steps} steps of the run (num_steps)"
            )

    @property
    def micro_batch_size(self) -> int:
        """Images per forward pass in each process."""
        return self.batch_size // self.accumulation

    def evaluates_after(self, steps: int) -> bool:
        """Whether an evaluation follows when ``steps`` are done."""
        return steps == self.num_steps or (self.eval_every is not None and steps % self.eval_every == 0)

    def saves_after(self, steps: int) -> bool:
        """Whether a checkpoint follows when ``steps`` are done."""
        every = self.checkpoint_every or max(1, self.num_steps // 10)
        return steps == self.num_steps or steps % every == 0


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_count(name: str, value: object, *, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise unless the number is finite and within its bounds; None stands for "not asked for"."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    bounds = (
        ("at least", least, least is None or value >= least),
        ("above", above, above is None or value > above),
        ("at most", most, most is None or value <= most),
        ("below", below, below is None or value < below),
    )
    if math.isfinite(value) and all(holds for _, _, holds in bounds):
        return
    wanted = " and ".join(f"{words} {bound:g}" for words, bound, _ in bounds if bound is not None)
    raise ValueError(f"{name} must be {wanted}, got {value}")
