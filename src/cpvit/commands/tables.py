"""The text that goes with a record: one plain table, aligned, no colour."""

from __future__ import annotations

from collections.abc import Sequence

from cpvit.benchmark import BenchmarkResult
from cpvit.evaluate import EvalResult
from cpvit.finetune import FinetuneResult
from cpvit.plan import Plan


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
    if result.images_skipped:
        lines.append(f"skipped {result.images_skipped} unreadable images: {', '.join(result.skipped)}")
    return "\n".join(lines)


def plan_text(plan: Plan) -> str:
    """What leaves each block, and where the schedule comes from."""
    images = f" on {plan.calibration_images} images" if plan.calibration_images else ""
    lines = [
        f"method {plan.method}, {plan.dial}, schedule {plan.schedule}{images}",
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
        [
            name,
            f"{side.images_per_s:.1f}",
            f"{side.latency_ms.median:.1f}",
            f"{side.latency_ms.p10:.1f}",
            f"{side.latency_ms.p90:.1f}",
            f"{side.macs / 1e9:.3f}",
            f"{side.peak_memory_mib:.0f}",
        ]
        for name, side in (("dense", result.dense), ("pruned", result.pruned))
    ]
    environment = result.environment
    verdict = "" if result.speedup > 1.02 else "; no time was gained here"
    return "\n".join(
        [
            f"{result.model}, batch {result.batch_size}, {environment.dtype} on {environment.device} "
            f"({environment.device_name}, {environment.threads} threads), {result.rounds} rounds in turn",
            table(["", "images/s", "ms median", "ms p10", "ms p90", "GMACs", "peak MiB"], rows),
            f"speed-up {result.speedup:.2f}x for {100 * result.macs_ratio:.1f}% of the MACs: "
            f"efficiency {result.efficiency:.2f}{verdict}",
            plan_text(result.plan),
        ]
    )


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
