"""Pruning with finetuning: train a pruned model so that it wins back what pruning cost."""

from cpvit.finetune.checkpoint import Evaluation
from cpvit.finetune.config import (
    DistillationConfig,
    FinetuneConfig,
    FreezeConfig,
    OptimizerConfig,
    TighteningConfig,
)
from cpvit.finetune.loop import DivergedError, finetune
from cpvit.finetune.observe import Observer, Several, Silent, StepLog
from cpvit.finetune.processes import Processes, start_processes
from cpvit.finetune.result import FinetuneResult

__all__ = [
    "DistillationConfig",
    "DivergedError",
    "Evaluation",
    "FinetuneConfig",
    "FinetuneResult",
    "FreezeConfig",
    "Observer",
    "OptimizerConfig",
    "Processes",
    "Several",
    "Silent",
    "StepLog",
    "TighteningConfig",
    "finetune",
    "start_processes",
]
