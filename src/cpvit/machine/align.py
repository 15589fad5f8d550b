"""Which multiple of tokens is fastest on this machine: what ``align="auto"`` stands for."""

from __future__ import annotations

import contextlib
import dataclasses

from cpvit.adapters import Host
from cpvit.machine.block_profiler import BlockProfiler
from cpvit.machine.time_model import predict_seconds
from cpvit.machine.timer import OnMessage
from cpvit.methods import method_named
from cpvit.plans.budget import BudgetError
from cpvit.plans.calibration import Calibration
from cpvit.plans.config import PruneConfig
from cpvit.plans.resolve import make_plan

ALIGN_CANDIDATES = (4, 8, 16, 32)
"""Multiples that "auto" tries besides 1: powers of two, as tiles and vector registers are."""


ALIGN_BATCH = 32
"""Batch that "auto" measures for unless told otherwise."""


CPU_BATCH = 16
"""On a CPU a larger batch only takes longer to measure: which numbers of tokens are good is decided by then."""


WORTH_IT = 0.95
"""A coarser multiple must save at least 5% of the predicted time: it fits the images less well too."""


def resolve_align(
    host: Host,
    config: PruneConfig,
    calibration: Calibration | None = None,
    *,
    batch_size: int | None = None,
    on_message: OnMessage = lambda _: None,
) -> PruneConfig:
    """The same configuration with ``align="auto"`` replaced by the number it stands for; any other as it is."""
    if config.align != "auto":
        return config
    batch = ALIGN_BATCH if batch_size is None else batch_size
    return dataclasses.replace(
        config, align=best_align(host, config, calibration, batch_size=batch, on_message=on_message)
    )


def best_align(
    host: Host,
    config: PruneConfig,
    calibration: Calibration | None = None,
    *,
    batch_size: int = ALIGN_BATCH,
    on_message: OnMessage = lambda _: None,
) -> int:
    """What ``align="auto"`` stands for: the multiple whose plan is predicted to be fastest on this machine.

    A block of the model is timed once at aligned and unaligned numbers of tokens (and cached, see
    :mod:`cpvit.machine.time_model`), from which the time of every candidate's plan is predicted. A coarser
    multiple must be worth it. Nothing is measured where nothing is pruned or the counts are given.

    Args:
        host: An untouched model.
        config: What is asked for; its ``align`` is ignored.
        calibration: As for :func:`make_plan`.
        batch_size: Images per forward to choose for.
        on_message: Called before something is measured, which takes some seconds.

    Raises:
        ValueError: The configuration does not fit the model, whatever the multiple.
    """
    plain = make_plan(host, dataclasses.replace(config, align="none"), calibration)
    if config.keep_per_block is not None or plain.patches_per_block[-1] == host.num_patches:
        return 1
    plans = {1: plain}
    for multiple in ALIGN_CANDIDATES:
        with contextlib.suppress(BudgetError):  # too coarse for this model: not a candidate
            plans[multiple] = make_plan(host, dataclasses.replace(config, align=multiple), calibration)
    on_cpu = host.device.type == "cpu"
    batch = min(batch_size, CPU_BATCH) if on_cpu else batch_size
    bench = BlockProfiler(host, method_named(config.method), batch, on_message=on_message)
    schedules = [plan.patches_per_block for plan in plans.values()]
    seconds = dict(zip(plans, predict_seconds(bench, schedules), strict=True))
    best = 1
    for multiple in sorted(seconds):
        if seconds[multiple] < WORTH_IT * seconds[best]:
            best = multiple
    return best
