"""From the options of ``cpvit predict`` and ``cpvit embed`` to a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from cpvit import __version__
from cpvit.adapters import Host
from cpvit.bulk.columns import Columns, Embedding, TokenList, TopClasses
from cpvit.bulk.folder import INDEX, begin, finish, refuse_other
from cpvit.bulk.images import LoaderOptions
from cpvit.bulk.listing import list_source, open_listed
from cpvit.bulk.models import BulkModel, exported_model, torch_model
from cpvit.bulk.parts import Parts, part_schema
from cpvit.bulk.ray_engine import run_on_ray
from cpvit.bulk.requirements import arrow_errors, required
from cpvit.bulk.result import BulkResult, bulk_text
from cpvit.bulk.running import Job, run_parts
from cpvit.bulk.sources import Source
from cpvit.bulk.stages import Stages, throughput, total
from cpvit.commands.bulk_options import BulkRequest, check_request
from cpvit.commands.common import (
    build_calibration,
    build_preprocessing,
    heads_need_images,
    is_first,
    joined,
    open_model,
    planned,
    progress_bar,
    say,
    write_record,
)
from cpvit.data.pixels import check_normalizer
from cpvit.export.program import digest
from cpvit.export.runtimes import open_exported
from cpvit.machine.device import choose_dtype
from cpvit.machine.environment import describe_environment
from cpvit.machine.processes import Processes, gathered
from cpvit.plans.config import PruneConfig
from cpvit.plans.escalation import Escalation
from cpvit.pruning.opening import open_as_it_is
from cpvit.pruning.prune import prune_host

PATIENCE = timedelta(days=30)
"""How long processes wait for one another: for the list of images, and at the end."""


def run_bulk(request: BulkRequest, json: Path | None) -> None:
    """Go through all images once, print how fast that was, and write the record.

    Raises:
        ValueError: Options contradict one another, a package is missing, or the folder holds another run.
        BadImageError: An image is bad, and the run is to stop then.
        OSError: A part cannot be written.
    """
    check_request(request)
    required("pyarrow")
    with arrow_errors(), joined(request.model, patience=PATIENCE) as processes:
        model = _build_model(request)
        job = _job(request, model, _listed(request, processes))
        missing = _missing(request, job, processes)
        start = time.perf_counter()
        done = _run(request, job, missing, processes)
        result = _result(request, job, done, time.perf_counter() - start, processes)
        if is_first(processes):
            finish(job.parts)
        print(bulk_text(result))
        write_record(result, json, processes)


def build_job(request: BulkRequest) -> Job:
    """The job of an actor: the run has been begun, and the images are listed.

    Raises:
        ValueError: What this machine finds is not what the run was begun with.
    """
    index = request.output.out / INDEX
    job = _job(
        request, _build_model(request), open_listed(request.images.data, index, column=request.images.column)
    )
    refuse_other(request.output.out, _fingerprint(request, job))
    return job


def _listed(request: BulkRequest, processes: Processes | None) -> Source:
    """The images; of several processes the first lists them."""
    images, index = request.images, request.output.out / INDEX
    listed = None
    if is_first(processes):
        request.output.out.mkdir(parents=True, exist_ok=True)
        listed = list_source(images.data, index, column=images.column)
    _wait(processes)
    return listed or open_listed(images.data, index, column=images.column)


def _missing(request: BulkRequest, job: Job, processes: Processes | None) -> list[int]:
    """Begin the run, or go on with it: the parts to make, as the first process finds them."""
    fingerprint = _fingerprint(request, job)
    found: list[int] = []
    if is_first(processes):
        begin(job.parts, fingerprint, say)
        found = job.parts.missing()
        if len(found) < len(job.parts):
            say(f"going on: {len(job.parts) - len(found)} of {len(job.parts)} parts are there")
    found = gathered(found, processes)
    refuse_other(request.output.out, fingerprint)
    return found


def _wait(processes: Processes | None) -> None:
    if processes is not None:
        processes.wait()


def _build_model(request: BulkRequest) -> BulkModel:
    columns = _columns(request)
    if request.instead.exported is not None:
        return exported_model(open_exported(request.instead.exported), columns, features=request.features)
    host = open_model(request.model)
    preprocessing = build_preprocessing(host.model, request.preprocessing)
    check_normalizer(preprocessing)
    weights = digest(host.model)
    escalation = _pruned(request, host)
    return torch_model(
        host,
        preprocessing,
        columns,
        features=request.features,
        weights_sha256=weights,
        escalation=escalation,
    )


def _columns(request: BulkRequest) -> Columns:
    if request.features is None:
        return TopClasses(request.top_k)
    return TokenList(request.dtype_out) if request.features == "tokens" else Embedding(request.dtype_out)


def _pruned(request: BulkRequest, host: Host) -> Escalation | None:
    """Prune the model as asked; two plans are returned instead."""
    instead = request.instead
    if open_as_it_is(host.model)[1] is not None:
        if instead.dense or instead.plan is not None or request.pruning != PruneConfig():
            raise ValueError(
                f"{request.model.model} holds a pruned model and its plan; leave out --dense, --plan, --method, --macs "
                "and the like"
            )
        return None
    if instead.dense:
        return None
    config = planned(request.pruning, instead.plan)
    if isinstance(config, Escalation):
        return config
    calibration = None
    if heads_need_images(config) or request.calibration.calibration is not None:
        calibration = build_calibration(host.model, request.calibration, request.preprocessing, seed=0)
    # Features that are made of patches must not lose them in the last block, as if nothing read what leaves it.
    reads_patches = request.features in ("mean", "tokens")
    reader = replace(host, discards_patches=host.discards_patches and not reads_patches)
    prune_host(reader, config, calibration=calibration)
    return None


def _job(request: BulkRequest, model: BulkModel, source: Source) -> Job:
    images, output = request.images, request.output
    description = asdict(model.description) | {"command": request.command, "version": __version__}
    if request.features is not None:
        description["dtype_out"] = request.dtype_out
    return Job(
        source=source,
        model=model,
        parts=Parts(output.out, len(source), output.rows_per_part),
        schema=part_schema(model.columns, model.width, description),
        loader=LoaderOptions(images.batch_size, images.workers, pin_memory=model.device.type == "cuda"),
        on_error=images.on_error,
    )


def _fingerprint(request: BulkRequest, job: Job) -> dict[str, Any]:
    """What decides the output."""
    return {
        "command": request.command,
        "model": asdict(job.model.description),
        "source": {"images": len(job.source), "fingerprint": job.source.fingerprint},
        "output": {
            "columns": repr(job.model.columns),
            "rows_per_part": request.output.rows_per_part,
            "batch_size": request.images.batch_size,
        },
        "version": __version__,
    }


def _run(request: BulkRequest, job: Job, missing: list[int], processes: Processes | None) -> Stages:
    """Make the missing parts; the account of all processes."""
    mine = missing if processes is None else missing[processes.rank :: processes.world_size]
    with progress_bar() as bar:
        task = bar.add_task("images", total=sum(len(job.parts.rows_of(part)) for part in mine))
        on_images: Callable[[int], None] = partial(bar.advance, task)
        if request.output.engine == "ray":
            return run_on_ray(partial(build_job, request), job.parts, request.output, on_images)
        return total(gathered([run_parts(job, mine, on_images)], processes))


def _result(
    request: BulkRequest, job: Job, done: Stages, seconds: float, processes: Processes | None
) -> BulkResult:
    output, workers = request.output, request.images.workers
    count = output.actors if output.engine == "ray" else 1 if processes is None else processes.world_size
    return BulkResult(
        command=request.command,
        out=str(output.out),
        model=job.model.description,
        images=len(job.source),
        done=done.images,
        bad_images=done.bad_images,
        parts=done.parts,
        seconds=seconds,
        images_per_s=done.images / seconds,
        stages=throughput(done, seconds, workers=workers, processes=count),
        engine=output.engine,
        processes=count,
        workers=workers,
        environment=describe_environment(job.model.device, choose_dtype(request.model.dtype), 0),
    )
