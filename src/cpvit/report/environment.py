"""Where every number comes from: file, command, machine, versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cpvit.report.fields import Fields
from cpvit.report.records import Record

NOT_RECORDED = "not recorded (written by an older cpvit, or from Python)"


@dataclass(frozen=True)
class Source:
    """One record."""

    name: str
    kind: str
    command: str
    time: str
    machine: tuple[tuple[str, str], ...]
    """Names and values."""


def sources(records: Sequence[Record]) -> tuple[Source, ...]:
    """Of every record."""
    return tuple(_source(record) for record in records)


def _source(record: Record) -> Source:
    made = record.fields.child("made_by") if "made_by" in record.fields else Fields({}, record.source)
    environment = next(_environments(record), None)
    return Source(
        name=record.source,
        kind=record.kind,
        command=made.text("command") if "command" in made else NOT_RECORDED,
        time=made.text("time") if "time" in made else "",
        machine=() if environment is None else tuple(_machine(environment)),
    )


def _environments(record: Record) -> Iterator[Fields]:
    if "environment" in record.fields:
        yield record.fields.child("environment")
    elif record.kind == "benchmarks":
        yield from (setting.child("environment") for setting in record.fields.children("settings"))


def _machine(fields: Fields) -> Iterator[tuple[str, str]]:
    yield "device", f"{fields.text('device_name')} ({fields.text('device')})"
    yield "dtype", fields.text("dtype")
    yield "threads", str(fields.count("threads"))
    yield "seed", str(fields.count("seed"))
    versions = fields.child("versions")
    yield "versions", ", ".join(f"{name} {versions.text(name)}" for name in versions.values)
