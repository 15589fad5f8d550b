"""Speed, its spread, and what of it the MACs explain; in PyTorch and in other runtimes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cpvit.report.fields import Fields
from cpvit.report.records import Record


@dataclass(frozen=True)
class Speed:
    """One model in one setting."""

    setting: str
    """Model, batch size, image size, dtype, device."""
    name: str
    """ "dense", a method, or both with runtime and precision."""
    images_per_s: float
    latency: tuple[float, float, float]
    """Milliseconds: median, 10th and 90th percentile."""
    speedup: tuple[float, float, float]
    """Over the dense model: median, 10th and 90th percentile over the rounds; 1 for the dense model itself."""
    macs: float
    efficiency: float
    """Speed-up times MACs: 1 if the clock follows the count."""
    memory: float | None
    """MiB."""
    in_all: float | None
    """Over dense float32 in PyTorch, in a comparison of runtimes."""
    verdict: str


def speeds(records: Sequence[Record]) -> tuple[Speed, ...]:
    """Everything that was timed."""
    return tuple(row for record in records for row in _rows(record))


def exports(records: Sequence[Record]) -> tuple[dict[str, str], ...]:
    """Files that were exported, as rows of a table."""
    return tuple(_export(record.fields) for record in records if record.kind == "export")


def failures(records: Sequence[Record]) -> tuple[str, ...]:
    """What could not be timed, and why."""
    found: list[str] = []
    for record in records:
        if record.kind == "benchmarks":
            found += record.fields.texts("failed")
        elif record.kind in ("runtimes", "comparison"):
            found += [f"{one.text('name')}: {one.text('error')}" for one in record.fields.children("unfit")]
    return tuple(found)


def _rows(record: Record) -> Iterator[Speed]:
    fields = record.fields
    if record.kind == "benchmark":
        setting, dense = _setting(fields), fields.child("dense")
        yield _dense(setting, dense)
        values = {
            **fields.values,
            "speedup": fields.values["speedup_by_round"],
            "timing": fields.values["pruned"],
        }
        yield _pruned(setting, fields.child("plan").text("method"), Fields(values, fields.place))
    elif record.kind == "comparison":
        yield from _comparison(fields)
    elif record.kind == "benchmarks":
        for setting_fields in fields.children("settings"):
            yield from _comparison(setting_fields)
    elif record.kind == "runtimes":
        yield from (_runtime(_setting(fields, dtype=False), row) for row in fields.children("rows"))


def _comparison(fields: Fields) -> Iterator[Speed]:
    setting = _setting(fields)
    yield _dense(setting, fields.child("dense"))
    for row in fields.children("rows"):
        yield _pruned(setting, row.text("name"), row)


def _setting(fields: Fields, *, dtype: bool = True) -> str:
    environment = fields.child("environment")
    size = "×".join(map(str, fields.counts("image_size")))
    parts = [fields.text("model"), f"batch {fields.count('batch_size')}", size]
    parts += [environment.text("dtype")] if dtype else []
    parts.append(f"{environment.text('device_name')}, {environment.count('threads')} threads")
    if fields.values.get("end_to_end"):
        parts.append("decoding included")
    return " · ".join(parts)


def _dense(setting: str, timing: Fields) -> Speed:
    return Speed(
        setting=setting,
        name="dense",
        images_per_s=timing.number("images_per_s"),
        latency=_spread(timing.child("latency_ms")),
        speedup=(1.0, 1.0, 1.0),
        macs=1.0,
        efficiency=1.0,
        memory=timing.number("peak_memory_mib"),
        in_all=None,
        verdict="",
    )


def _pruned(setting: str, name: str, row: Fields) -> Speed:
    timing = row.child("timing")
    return Speed(
        setting=setting,
        name=name,
        images_per_s=timing.number("images_per_s"),
        latency=_spread(timing.child("latency_ms")),
        speedup=_spread(row.child("speedup")),
        macs=row.number("macs_ratio"),
        efficiency=row.number("efficiency"),
        memory=timing.number("peak_memory_mib"),
        in_all=None,
        verdict=row.text("verdict"),
    )


def _runtime(setting: str, row: Fields) -> Speed:
    return Speed(
        setting=setting,
        name=f"{row.text('name')}, {row.text('runtime')} {row.text('dtype')}",
        images_per_s=row.number("images_per_s"),
        latency=_spread(row.child("latency_ms")),
        speedup=_spread(row.child("speedup")),
        macs=row.number("macs_ratio"),
        efficiency=row.number("efficiency"),
        memory=None,
        in_all=row.number("in_all"),
        verdict="",
    )


def _spread(fields: Fields) -> tuple[float, float, float]:
    return fields.number("median"), fields.number("p10"), fields.number("p90")


def _export(fields: Fields) -> dict[str, str]:
    described, parity = fields.child("description"), fields.child("parity")
    plan = described.child("plan") if "plan" in described else None
    return {
        "file": fields.text("path"),
        "model": described.text("model"),
        "for": f"{described.text('format')}, {described.text('precision')}",
        "MACs": "dense" if plan is None else f"{100 * plan.number('macs_ratio'):.1f}%",
        "MB": f"{fields.number('bytes') / 1e6:.1f}",
        "agreement with torch": f"{parity.number('agreement'):.4f}",
        "KL": f"{parity.number('kl'):.2g}",
    }
