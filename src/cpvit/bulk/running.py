"""The loop: images of the parts that are missing through the model and into their files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, TypeAlias

from cpvit.bulk.images import LoaderOptions, PixelBatch, load_batches
from cpvit.bulk.models import BulkModel
from cpvit.bulk.parts import Parts, table_of, write_part
from cpvit.bulk.sources import Source
from cpvit.bulk.stages import Stages
from cpvit.data import BadImageError

OnError: TypeAlias = Literal["row", "stop"]


@dataclass(frozen=True)
class Job:
    """All that a process needs to make parts."""

    source: Source
    model: BulkModel
    parts: Parts
    schema: Any
    loader: LoaderOptions
    on_error: OnError = "row"


def run_parts(job: Job, parts: Sequence[int], on_images: Callable[[int], None] = lambda _: None) -> Stages:
    """Make some parts, in order.

    Args:
        job: What to do.
        parts: Numbers of the parts.
        on_images: Called with the number of images that are done, after each batch.

    Raises:
        BadImageError: An image is bad, and the job is to stop then.
        BadArchiveError: A file that holds images is damaged.
        OSError: A part cannot be written. Parts that are complete stay.
    """
    account = _Account()
    rows = [(part, job.parts.rows_of(part)) for part in parts]
    batches = account.waited_for(load_batches(job.source, job.model.preprocessing, rows, job.loader))
    for part, of_part in groupby(batches, key=lambda batch: batch.part):
        tables = _tables(job, of_part, account, on_images)
        start, others = time.perf_counter(), account.not_writing
        write_part(job.parts.path(part), tables, job.schema)
        account.writing += time.perf_counter() - start - (account.not_writing - others)
        account.parts += 1
    return account.stages()


def _tables(
    job: Job, batches: Iterator[PixelBatch], account: _Account, on_images: Callable[[int], None]
) -> Iterator[Any]:
    for batch in batches:
        bad = [error for error in batch.errors if error is not None]
        if bad and job.on_error == "stop":
            raise BadImageError(f"{bad[0]}, or let such images be rows with the reason (--on-error row)")
        start = time.perf_counter()
        arrays = {} if batch.pixels is None else job.model.columns.arrays(job.model.forward(batch.pixels))
        account.forward += time.perf_counter() - start
        account.add(batch)
        yield table_of(batch, arrays, job.schema)
        on_images(len(batch.rows))


class _Account:
    """Seconds and counts of one process. Tables are made while a part is written, and are not writing."""

    def __init__(self) -> None:
        self._counts = Stages()
        self.forward = self.writing = self.waiting = 0.0
        self.parts = 0

    @property
    def not_writing(self) -> float:
        return self.forward + self.waiting

    def waited_for(self, batches: Iterator[PixelBatch]) -> Iterator[PixelBatch]:
        """The same batches; how long each was waited for is counted."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waiting += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, batch: PixelBatch) -> None:
        bad = sum(error is not None for error in batch.errors)
        self._counts += Stages(
            images=len(batch.rows), bad_images=bad, reading=batch.read_seconds, decoding=batch.decode_seconds
        )

    def stages(self) -> Stages:
        return replace(
            self._counts,
            parts=self.parts,
            forward=self.forward,
            writing=self.writing,
            waiting=self.waiting,
        )
