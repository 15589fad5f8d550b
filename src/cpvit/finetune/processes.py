"""One process or many: Hugging Face Accelerate behind the few things a training loop needs of it.

Many are started by ``torchrun`` or ``accelerate launch``; nothing here launches anything.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpvit.machine.device import choose_device


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    accelerator: Any
    """Accelerate's, set up without mixed precision: the loop does that itself."""
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
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in training: it averages gradients over the processes."""
        wrapped: nn.Module = self.accelerator.prepare_model(model, device_placement=False)
        return wrapped

    def without_averaging(self, model: nn.Module, *, when: bool) -> AbstractContextManager[Any]:
        """Gradients are only added up inside: more passes of the same step follow."""
        held: AbstractContextManager[Any] = self.accelerator.no_sync(model) if when else nullcontext()
        return held

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

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def part(self) -> None:
        """Take leave of the others, at the very end; nothing happens if there are none."""
        if self.world_size > 1:
            self.accelerator.end_training()


def start_processes(device: str = "auto") -> Processes:
    """Join the processes this one was started with, or be the only one.

    Args:
        device: auto, cpu, cuda ...; several processes take the GPU of their number each.

    Raises:
        ValueError: Started for a kind of parallelism that splits the model, or an unknown device.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    chosen = choose_device(device)
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision="no")
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known:
        raise ValueError(
            f"finetuning runs in one process or data-parallel, not with {accelerator.distributed_type.value}; "
            "start it with torchrun, or with accelerate launch --multi_gpu"
        )
    return Processes(accelerator, chosen if accelerator.num_processes == 1 else accelerator.device)
