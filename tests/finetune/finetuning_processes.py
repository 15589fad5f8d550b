"""Run as a script: imports once, then forks the processes that a test starts, kills and counts.

python finetuning_processes.py kill|distributed FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from finetuning import student, train

from cpvit.finetune import FinetuneConfig, FinetuneResult, OptimizerConfig, TighteningConfig

KILLED = FinetuneConfig(
    num_steps=20,
    batch_size=4,
    checkpoint_every=1,
    eval_every=8,
    ema_decay=0.9,
    tightening=TighteningConfig(tighten_steps=12),
    optimization=OptimizerConfig(learning_rate=1e-3),
)
SHARED = FinetuneConfig(
    num_steps=6,
    batch_size=8,
    accumulation=2,
    eval_every=3,
    optimization=OptimizerConfig(optimizer="sgd", learning_rate=0.05, weight_decay=0.0),
)
KILLS = 6


def forked(work: Callable[[], object]) -> int:
    """A process that does the work and leaves without any of the parent's business."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def killed(folder: Path) -> dict[str, Any]:
    """A run that is killed at random moments until it is through, and what it made."""
    moments = random.Random(0)
    kills = 0
    seconds = 0.0
    while True:
        begun = time.monotonic()
        child = forked(lambda: train_killed(folder))
        if kills < KILLS:
            time.sleep(moments.uniform(0.05, 0.35))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        seconds += time.monotonic() - begun
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, "the run failed"
            return {"kills": kills, **outcome(train_killed(folder)), "seconds": seconds}
        kills += 1


def train_killed(folder: Path) -> FinetuneResult:
    return train(folder, KILLED, model=student(drop_path_rate=0.3), resume=True)


def distributed(folder: Path, world_size: int = 2) -> dict[str, Any]:
    """As torchrun would: a process per rank, told by the environment who it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = dataclasses.replace(SHARED, batch_size=SHARED.batch_size // world_size)

    def work(rank: int) -> None:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        result = train(folder / "run", config)
        (folder / f"rank{rank}.json").write_text(json.dumps(outcome(result)))
        torch.distributed.destroy_process_group()

    children = [forked(lambda rank=rank: work(rank)) for rank in range(world_size)]  # type: ignore[misc]
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0, "a process failed"
    return {
        f"rank{rank}": json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)
    }


def outcome(result: FinetuneResult) -> dict[str, Any]:
    return {
        "loss": result.history["loss"],
        "grad_norm": result.history["grad_norm"],
        "images_per_s": result.history["images_per_s"],
        "seconds": result.seconds,
        "evaluations": [dataclasses.asdict(evaluation) for evaluation in result.evaluations],
        "processes": result.facts["processes"],
    }


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if what == "kill":
        found = {
            "killed": killed(folder / "killed"),
            "whole": outcome(train(folder / "whole", KILLED, model=student(drop_path_rate=0.3))),
        }
    else:
        found = {**distributed(folder), "alone": outcome(train(folder / "alone", SHARED))}
    (folder / "outcome.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
