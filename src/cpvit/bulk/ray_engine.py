"""Ray Data runs the parts on a cluster: an actor prunes once and makes parts; Ray schedules, scales and retries.

A part is written beside its place and then put there, so an actor or a node that dies loses at most the part at hand,
which Ray gives to another; a part made twice is the same file. Images, weights and ``--out`` must be where every node
finds them by the same path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cpvit.bulk.parts import Parts
from cpvit.bulk.requirements import required
from cpvit.bulk.running import Job, run_parts
from cpvit.bulk.stages import Stages, total

BuildJob = Callable[[], Job]
"""Called once per actor. Must survive pickling: a function of a module, or a partial of one."""


@dataclass(frozen=True)
class RayOptions:
    """For --engine ray."""

    ray_address: str | None = None
    """Of a running cluster (auto, or ray://HOST:PORT); by default that of RAY_ADDRESS, or a new one here."""
    actors: int = 1
    """Models at most at a time; Ray starts them as there is room, and ends them when there is nothing left to do."""
    cpus_per_actor: float = 1.0
    """Processors that Ray reserves for an actor, and threads that it computes with."""
    gpus_per_actor: float = 0.0
    """GPUs (or parts of one) that Ray reserves for an actor."""


class PartMaker:
    """For ``map_batches`` of Ray Data: part numbers in, what became of them out. Opens and prunes the model once.

    Args:
        build: Makes the job.
        threads: That torch computes with.

    Example:
        >>> parts.map_batches(PartMaker, fn_constructor_args=(build, 1), batch_size=1, compute=pool)  # doctest: +SKIP
    """

    def __init__(self, build: BuildJob, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self._job = build()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the parts numbered in ``part``; one that is there already, made by an actor that died, is left alone."""
        made = [self._made(int(part)) for part in batch["part"]]
        return {"part": batch["part"]} | {
            name: np.array([getattr(one, name) for one in made]) for name in vars(Stages())
        }

    def _made(self, part: int) -> Stages:
        if self._job.parts.path(part).exists():
            return Stages()
        return run_parts(self._job, [part])


def run_on_ray(
    build: BuildJob,
    parts: Parts,
    options: RayOptions,
    on_images: Callable[[int], None] = lambda _: None,
) -> Stages:
    """Make the parts that are missing on a cluster.

    Args:
        build: Makes the job in an actor.
        parts: Which there are.
        options: The cluster, and what an actor takes of it.
        on_images: Called with the number of images of each part that is done.

    Raises:
        MissingPackageError: Ray is not installed.
        ValueError: What an actor raised, with its message.
    """
    ray, data = required("ray"), required("ray.data")
    if not ray.is_initialized():
        ray.init(address=options.ray_address, include_dashboard=False, logging_level="warning")
    missing = parts.missing()
    if not missing:
        return Stages()
    data.DataContext.get_current().enable_progress_bars = False
    numbers = data.from_items(
        [{"part": part} for part in missing], override_num_blocks=min(len(missing), 1000)
    )
    made = numbers.map_batches(
        PartMaker,
        fn_constructor_args=(build, max(1, int(options.cpus_per_actor))),
        batch_size=1,
        compute=data.ActorPoolStrategy(min_size=1, max_size=options.actors),
        num_cpus=options.cpus_per_actor,
        num_gpus=options.gpus_per_actor or None,
    )
    found: list[Stages] = []
    try:
        for row in made.iter_rows():
            found.append(Stages(**{name: row[name] for name in vars(Stages())}))
            on_images(int(found[-1].images))
    except ray.exceptions.RayError as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        raise ValueError(f"an actor of Ray failed: {cause}") from error
    return total(found)
