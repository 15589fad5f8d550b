"""One process or many: Hugging Face Accelerate behind the few things that training and evaluation need of it.

Many are started by ``torchrun`` or ``accelerate launch``; nothing here launches anything.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from cpvit.machine.device import choose_device

# Before 2.8 a process that leaves its group waits for gloo's threads and holds the interpreter's lock; a thread that
# still has to let go of the last exchange's tensors waits for that lock: for ever (pytorch/pytorch#154976).
LEAVING_MAY_HANG = torch.__version__ < TorchVersion("2.8")
LETTING_GO_SECONDS = 0.2


@dataclass(frozen=True)
class Processes:
    """This process among those that work together."""

    accelerator: Any
    """Accelerate's; without its mixed precision (:mod:`cpvit.finetune.precision`)."""
    device: torch.device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return bool(self.accelerator.is_main_process)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, on every one of them."""
        return self._reduced(values, "mean")

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, on every one of them."""
        return self._reduced(values, "sum")

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        if self.world_size == 1:
            return values
        reduced: Tensor = self.accelerator.reduce(values.to(self.device), reduction=how)
        return reduced

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all processes, in the order of their numbers, on every one of them."""
        if self.world_size == 1:
            return values
        from accelerate.utils import gather_object

        # torch 2.5 fills its buffers in another thread, which is in no inference mode: they must be normal tensors.
        with torch.inference_mode(False):
            gathered: list[Any] = gather_object(values)
        return gathered

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def part(self) -> None:
        """Leave the process group, at the very end; nothing happens if there is none."""
        if self.world_size == 1:
            return
        if LEAVING_MAY_HANG:
            time.sleep(LETTING_GO_SECONDS)  # without the lock, so that gloo's threads can let go
        self.accelerator.end_training()


def start_processes(
    device: str = "auto", *, logging_dir: Path | None = None, patience: timedelta | None = None
) -> Processes:
    """Join the processes this one was started with, or be the only one.

    Args:
        device: auto, cpu, cuda ...; several processes take the accelerator of their number each.
        logging_dir: Where the ``TensorBoard`` callback makes its folder; needed only for that.
        patience: How long a process waits for the others before it gives up; default: torch's 10 or 30 minutes.

    Raises:
        ValueError: Started for a kind of parallelism that splits the model, or an unknown device.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    chosen = choose_device(device)
    tracking = {} if logging_dir is None else {"log_with": "tensorboard", "project_dir": logging_dir}
    waiting = {} if patience is None else {"kwargs_handlers": [InitProcessGroupKwargs(timeout=patience)]}
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision="no", **tracking, **waiting)
    kind = accelerator.distributed_type
    # One name per kind of device: MULTI_CPU, MULTI_GPU, MULTI_XPU ...
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ValueError(
            f"cpvit runs in one process or data-parallel, not with {kind.value}; "
            "start it with torchrun, or with accelerate launch --multi_gpu"
        )
    return Processes(accelerator, chosen if accelerator.num_processes == 1 else accelerator.device)


T = TypeVar("T")


def gathered(values: list[T], processes: Processes | None) -> list[T]:
    """The values of all processes, in the order of their numbers; None is one process."""
    return values if processes is None else processes.gather(values)
