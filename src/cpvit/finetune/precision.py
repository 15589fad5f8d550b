"""Mixed precision by torch: autocast, and the scale of the loss that float16 needs.

Accelerate fixes its precision for the whole process when the first Accelerator is made, and ignores fp16 on a CPU; here
each run has its own, and it is the one asked for.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from cpvit.finetune.config import DtypeName
from cpvit.machine.device import DTYPES


def autocast(device: torch.device, dtype: DtypeName) -> AbstractContextManager[Any]:
    """Arithmetic in this dtype inside the ``with``."""
    chosen = DTYPES[dtype]
    return torch.autocast(device.type, dtype=chosen, enabled=chosen != torch.float32)


def gradient_scaler(device: torch.device, dtype: DtypeName) -> torch.amp.GradScaler:
    """Scales the loss for float16, and does nothing for other dtypes."""
    return torch.amp.GradScaler(device.type, enabled=dtype == "float16")
