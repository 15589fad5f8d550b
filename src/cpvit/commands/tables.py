"""The text that goes with a record: one plain table, aligned, no colour."""

from __future__ import annotations

from collections.abc import Sequence

from cpvit.export.benchmark import RuntimeComparison
from cpvit.export.evaluating import ExportedEval
from cpvit.export.exporting import Exported
from cpvit.finetune import FinetuneResult
from cpvit.measure.evaluate import EscalationResult, EvalResult, SavedEvalResult
from cpvit.measure.timings import BenchmarkResult, Comparison, Timing
from cpvit.plans.plan import Plan


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    return "\n".join(_line(row, widths) for row in (header, *rows))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join(cells).rstrip()


def eval_text(result: EvalResult) -> str:
    """Dense and pruned, what was lost, and how."""
    rows = [
        [
            name,
            f"{side.top1:.2f}",
            f"{side.top5:.2f}",
            f"{side.macs / 1e9:.3f}",
            f"{side.params / 1e6:.2f}",
        ]
        for name, side in (("dense", result.dense), ("pruned", result.pruned))
    ]
    lines = [
        f"{result.model}, {result.images} images, {result.environment.dtype} on {result.environment.device}",
        table(["", "top-1 %", "top-5 %", "GMACs", "Mparams"], rows),
        f"top-1 lost {result.dense.top1 - result.pruned.top1:.2f} points, agreement {result.agreement:.4f}, "
        f"KL {result.kl:.4f} nats, MACs {100 * result.macs_ratio:.2f}% of dense",
        plan_text(result.plan),
    ]
    if result.escalation is not None:
        lines.append(escalation_text(result.escalation))
    if result.images_skipped:
        lines.append(f"skipped {result.images_skipped} unreadable images: {', '.join(result.skipped)}")
    return "\n".join(lines)


def export_text(found: Exported) -> str:
    """What was written, what it takes, and how it compared with torch."""
    described, parity = found.description, found.parity
    what = "dense" if described.plan is None else f"{100 * described.plan.macs_ratio:.1f}% of the MACs"
    dtype = "uint8 RGB" if described.normalized_inside else "float32, normalised"
    seen = "images" if parity.real_images else "images of noise"
    lines = [
        f"{described.model}, {what}, {described.precision}, for {described.format}: {found.bytes / 1e6:.1f} MB, "
        f"{found.seconds:.1f} s",
        f"input [{' '.join(map(str, described.input_shape))}] {dtype}; output [batch {described.num_outputs}]",
        f"next to torch in float32 on {parity.images} {seen}: largest difference {parity.max_difference:.2g}, "
        f"agreement {parity.agreement:.4f}, KL {parity.kl:.2g} nats (at most {parity.most_kl:g})",
    ]
    return "\n".join(lines if described.plan is None else [*lines, plan_text(described.plan)])


def exported_text(result: ExportedEval) -> str:
    """Accuracy of a file, next to the dense model if there is one."""
    described, dense = result.description, result.dense
    rows = [[described.precision, f"{result.top1:.2f}", f"{result.top5:.2f}", f"{described.macs / 1e9:.3f}"]]
    lines = [f"{described.model} for {described.format}, {result.images} images"]
    if dense is not None:
        rows.insert(0, ["dense, torch", f"{dense.top1:.2f}", f"{dense.top5:.2f}", ""])
    lines.append(table(["", "top-1 %", "top-5 %", "GMACs"], rows))
    if dense is not None:
        lines.append(
            f"top-1 lost {dense.top1 - result.top1:.2f} points, agreement {dense.agreement:.4f}, KL {dense.kl:.4f} nats"
        )
    if described.plan is not None:
        lines.append(plan_text(described.plan))
    if result.images_skipped:
        lines.append(f"skipped {result.images_skipped} unreadable images: {', '.join(result.skipped)}")
    return "\n".join(lines)


def saved_eval_text(result: SavedEvalResult) -> str:
    """A pruned model alone."""
    side = result.pruned
    row = [
        "pruned",
        f"{side.top1:.2f}",
        f"{side.top5:.2f}",
        f"{side.macs / 1e9:.3f}",
        f"{side.params / 1e6:.2f}",
    ]
    lines = [
        f"{result.model}, {result.images} images, {result.environment.dtype} on {result.environment.device}",
        table(["", "top-1 %", "top-5 %", "GMACs", "Mparams"], [row]),
        plan_text(result.plan),
    ]
    if result.images_skipped:
        lines.append(f"skipped {result.images_skipped} unreadable images: {', '.join(result.skipped)}")
    return "\n".join(lines)


def escalation_text(result: EscalationResult) -> str:
    """Which images ran again, and under what."""
    again = "dense" if result.second is None else f"{100 * result.second.macs_ratio:.1f}% of the MACs"
    return (
        f"{100 * result.share:.1f}% of the images ran again ({again}): their two largest probabilities were closer "
        f"than {result.margin:.3f}"
    )


def plan_text(plan: Plan) -> str:
    """What leaves each block, and where the schedule comes from."""
    images = f" on {plan.calibration_images} images" if plan.calibration_images else ""
    align = f", align {plan.align}" if plan.align > 1 else ""
    lines = [
        f"method {plan.method}, {plan.dial}, schedule {plan.schedule}{images}{align}",
        f"tokens leaving each block: {_numbers(plan.tokens_per_block)} (of {plan.num_prefix + plan.num_patches})",
    ]
    if plan.mask_heads is not None:
        lines.append(f"heads masked per image, kept: {_numbers(plan.mask_heads)} (saves no time, no MACs)")
    elif plan.heads_per_block != plan.num_heads:
        lines.append(f"heads in each block: {_numbers(plan.heads_per_block)} (of {_numbers(plan.num_heads)})")
    elif "head_keep_rate" in plan.dial:
        lines.append(
            f"heads in each block: all {plan.num_heads[0]} (too few heads for this head_keep_rate to cut one)"
        )
    return "\n".join(lines)


def _numbers(values: Sequence[int]) -> str:
    return " ".join(str(value) for value in values)


def benchmark_text(result: BenchmarkResult) -> str:
    """Dense and pruned speed, and whether the clock followed the count."""
    rows = [
        [name, *_timing_cells(side), f"{side.macs / 1e9:.3f}", f"{side.peak_memory_mib:.0f}"]
        for name, side in (("dense", result.dense), ("pruned", result.pruned))
    ]
    spread = result.speedup_by_round
    verdict = "" if result.verdict == "faster" else f"; {_NO_GAIN[result.verdict]}"
    return "\n".join(
        [
            _setting(result),
            table(["", *_TIMING_COLUMNS, "GMACs", "peak MiB"], rows),
            f"speed-up {result.speedup:.2f}x for {100 * result.macs_ratio:.1f}% of the MACs: "
            f"efficiency {result.efficiency:.2f}{verdict}",
            f"speed-up by round: median {spread.median:.2f}x, p10 {spread.p10:.2f}x, p90 {spread.p90:.2f}x",
            plan_text(result.plan),
        ]
    )


_NO_GAIN = {"gained nothing": "no time was gained here", "slower": "slower than dense here"}
_TIMING_COLUMNS = ("images/s", "ms median", "ms p10", "ms p90")


def _setting(result: BenchmarkResult | Comparison) -> str:
    environment = result.environment
    way = ", decoding and preprocessing included" if result.end_to_end else ""
    return (
        f"{result.model}, batch {result.batch_size}, {environment.dtype} on {environment.device} "
        f"({environment.device_name}, {environment.threads} threads), {result.rounds} rounds in turn{way}"
    )


def _timing_cells(side: Timing) -> list[str]:
    latency = side.latency_ms
    return [f"{value:.1f}" for value in (side.images_per_s, latency.median, latency.p10, latency.p90)]


def comparison_text(result: Comparison) -> str:
    """One setting: a row for the dense model and one for each method."""
    rows = [["dense", *_timing_cells(result.dense), "", "", "", "", "", "", _mib(result.dense), ""]]
    rows += [
        [
            row.name,
            *_timing_cells(row.timing),
            *(f"{value:.2f}x" for value in (row.speedup.median, row.speedup.p10, row.speedup.p90)),
            f"{row.macs_ratio:.3f}",
            f"{row.efficiency:.2f}",
            str(row.plan.align) if row.plan.align > 1 else "none",
            _mib(row.timing),
            row.verdict,
        ]
        for row in result.rows
    ]
    size = "x".join(str(side) for side in result.image_size)
    columns = ["", *_TIMING_COLUMNS, "speed-up", "p10", "p90", "MACs", "efficiency", "align", "peak MiB"]
    failed = [f"{unfit.name}: not run, {unfit.error}" for unfit in result.unfit]
    return "\n".join([f"images {size}, {_setting(result)}", table([*columns, "verdict"], rows), *failed])


def runtimes_text(result: RuntimeComparison) -> str:
    """A row for every model in every runtime and precision."""
    columns = ["", "images/s", "ms median", "speed-up", "p10", "p90", "MACs", "efficiency", "in all"]
    rows = [
        [
            f"{row.runtime}, {row.dtype}, {row.name}",
            f"{row.images_per_s:.1f}",
            f"{row.latency_ms.median:.1f}",
            *(f"{value:.2f}x" for value in (row.speedup.median, row.speedup.p10, row.speedup.p90)),
            f"{row.macs_ratio:.3f}",
            f"{row.efficiency:.2f}",
            f"{row.in_all:.2f}x",
        ]
        for row in result.rows
    ]
    environment, size = result.environment, "x".join(str(side) for side in result.image_size)
    failed = [f"{unfit.name}: not run, {unfit.error}" for unfit in result.unfit]
    return "\n".join(
        [
            f"{result.model}, images {size}, batch {result.batch_size}, on {environment.device_name} "
            f"({environment.threads} threads), {result.rounds} rounds in turn",
            table(columns, rows),
            "speed-up and efficiency: over dense in the same runtime and dtype; in all: over dense float32 torch",
            *failed,
        ]
    )


def _mib(side: Timing) -> str:
    return f"{side.peak_memory_mib:.0f}"


def gains_text(results: Sequence[Comparison]) -> str:
    """How many runs were faster, and by name those that gained nothing."""
    runs = [(result, row) for result in results for row in result.rows]
    idle = [
        f"{row.name} at {result.image_size[0]}x{result.image_size[1]}, batch {result.batch_size}, "
        f"{result.environment.dtype} ({row.verdict}: {row.speedup.p10:.2f}x to {row.speedup.p90:.2f}x)"
        for result, row in runs
        if row.verdict != "faster"
    ]
    count = f"{len(runs) - len(idle)} of {len(runs)} runs were faster than dense"
    return f"{count}; not faster: {'; '.join(idle)}" if idle else count


def finetune_text(result: FinetuneResult) -> str:
    """What came out of a finetuning run, how fast it was, and the plan."""
    shown = {"best": result.best, "last": result.final}
    rows = [
        [name, str(found.step), f"{found.top1:.2f}", f"{found.top5:.2f}", f"{found.loss:.4f}"]
        for name, found in shown.items()
        if found is not None
    ]
    environment = result.environment
    loss = result.history["loss"]
    lines = [
        f"{result.model}, {result.steps_done} steps, {environment.dtype} on {environment.device}, "
        f"{result.trained_values / 1e6:.2f} M weights trained",
        table(["", "step", "top-1 %", "top-5 %", "loss"], rows),
        f"training loss {loss[0]:.4f} -> {loss[-1]:.4f}, {result.images_per_s:.1f} images/s, "
        f"{result.seconds:.0f} s in training steps",
        "dense: nothing pruned" if result.plan is None else plan_text(result.plan),
    ]
    return "\n".join(lines)
