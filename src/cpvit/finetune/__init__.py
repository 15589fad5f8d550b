"""Pruning with finetuning: train a pruned model so that it recovers the accuracy that pruning cost."""

from cpvit.finetune.callbacks import Callback, CallbackList, StepLog
from cpvit.finetune.checkpoint import Evaluation
from cpvit.finetune.config import (
    DistillationConfig,
    FinetuneConfig,
    FreezeConfig,
    OptimizerConfig,
    TighteningConfig,
)
from cpvit.finetune.loop import DivergedError
from cpvit.finetune.result import FinetuneResult
from cpvit.finetune.run import RunOptions, finetune
from cpvit.machine.processes import Processes, start_processes

__all__ = [
    "Callback",
    "CallbackList",
    "DistillationConfig",
    "DivergedError",
    "Evaluation",
    "FinetuneConfig",
    "FinetuneResult",
    "FreezeConfig",
    "OptimizerConfig",
    "Processes",
    "RunOptions",
    "StepLog",
    "TighteningConfig",
    "finetune",
    "start_processes",
]
