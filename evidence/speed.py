"""Tables of speed, from records of ``cpvit benchmark`` and of the profile."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

from cpvit.commands.tables import comparison_text
from evidence.records import Loaded
from evidence.tables import markdown

MODELS = {
    "deit_small_patch16_224": "DeiT-Small 224",
    "deit_tiny_patch16_224": "DeiT-Tiny 224",
    "vit_base_patch16_224": "ViT-Base/16 224",
    "vit_base_patch16_384": "ViT-Base/16 384",
}
METHODS = {"cpvit": "`cpvit`", "cpvit-merge": "`cpvit-merge`", "tome": "ToMe"}
RUNTIMES = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
SPEED = ("speed-deit-small", "speed-deit-tiny", "speed-vit-base", "speed-vit-base-384")
PREFILL = {
    "vlm-llava": "LLaVA-1.5 7B (CLIP-L/14 at 336; Llama)",
    "vlm-paligemma": "PaliGemma 3B (SigLIP So400m/14 at 448; Gemma)",
    "vlm-internvl": "InternVL3 2B (InternViT at 448, one crop; Qwen2.5)",
}
README_ROWS = (
    ("deit_small_patch16_224", 32, "cpvit"),
    ("deit_small_patch16_224", 32, "cpvit-merge"),
    ("deit_tiny_patch16_224", 32, "cpvit-merge"),
    ("vit_base_patch16_224", 8, "cpvit-merge"),
    ("vit_base_patch16_384", 4, "cpvit-merge"),
    ("deit_small_patch16_224", 1, "cpvit"),
)


def output(records: Loaded) -> str:
    """What ``cpvit benchmark`` prints for one setting, with its command."""
    record = records["speed-deit-small"]
    (setting,) = _chosen(record["settings"], batch=32, dtype="float32")
    values = json.loads(json.dumps(setting), object_hook=lambda fields: SimpleNamespace(**fields))
    return f"```\n{record['made_by']['command']}\n```\n```\n{comparison_text(values)}\n```"


def short(records: Loaded) -> str:
    """One row a model, both dtypes."""
    settings = _settings(records)
    rows = []
    for model, batch, method in README_ROWS:
        found = [one for one in settings if (one["model"], one["batch_size"]) == (model, batch)]
        title = f"{MODELS[model]}, batch {batch}, {METHODS[method]}"
        rows.append([title, *(_cell(found, dtype, method) for dtype in ("float32", "bfloat16"))])
    header = ["speed-up (10th to 90th percentile), efficiency at 60% of the MACs", "float32", "bfloat16"]
    return _with_machine(markdown(header, rows), (records[name] for name in SPEED))


def whole(records: Loaded) -> str:
    """Every model, batch size and method, with memory and the commands."""
    rows = []
    by_size: dict[tuple[str, int], list[Any]] = {}
    for setting in _settings(records):
        by_size.setdefault((setting["model"], setting["batch_size"]), []).append(setting)
    for (model, batch), found in by_size.items():
        for method in dict.fromkeys(row["name"] for setting in found for row in setting["rows"]):
            cells = [_cell(found, dtype, method) for dtype in ("float32", "bfloat16")]
            memory = "; ".join(
                _memory(one, row) for one in found for row in one["rows"] if row["name"] == method
            )
            rows.append([MODELS[model], str(batch), METHODS[method], *cells, memory])
    header = [
        "model",
        "batch",
        "method",
        "float32: speed-up (10th to 90th percentile), efficiency",
        "bfloat16",
    ]
    table = markdown([*header, "peak MiB, dense and pruned (float32; bfloat16)"], rows)
    commands = "\n".join(records[name]["made_by"]["command"] for name in SPEED)
    return f"```\n{commands}\n```\n\n{_with_machine(table, (records[name] for name in SPEED))}"


def schedules(records: Loaded) -> str:
    """The curve next to the schedules of version 0.1, all in turn."""
    record = records["speed-schedules"]
    (setting,) = record["settings"]
    rows = []
    for method, before in (("cpvit", "linear-ramp"), ("cpvit-merge", "constant")):
        pair = [_row(setting, name) for name in (f"{method}:{before}", method)]
        rows.append([METHODS[method], *(f"{_speed(row)}, {_mib(row['timing'])} MiB" for row in pair)])
    rows.append(["dense", *[f"{_mib(setting['dense'])} MiB"] * 2])
    table = markdown(["", "version 0.1: ramp, constant", "curves"], rows)
    return _with_command(table, record)


def runtimes(records: Loaded) -> str:
    """Float32 in three runtimes, each next to the dense model in the same one."""
    record = records["speed-runtimes"]
    methods = list(dict.fromkeys(row["name"] for row in record["rows"] if row["plan"] is not None))
    rows = [
        [title, *(_speed(_in_runtime(record, runtime, "float32", method)) for method in methods)]
        for runtime, title in RUNTIMES.items()
    ]
    first = "float32, speed-up over dense in the same runtime (10th to 90th percentile), efficiency"
    table = markdown([first, *(METHODS[method] for method in methods)], rows)
    return _with_command(table, record)


def int8(records: Loaded) -> str:
    """Float32 and int8, next to dense float32 torch: what a user gains in all."""
    record = records["speed-int8"]
    rows = []
    for runtime, title in RUNTIMES.items():
        cells = []
        for dtype in ("float32", "int8"):
            found = [_in_runtime(record, runtime, dtype, name) for name in ("dense", "cpvit-merge")]
            cells.append(", ".join(f"{row['in_all']:.2f}x" for row in found if row is not None))
        rows.append([title, *cells])
    first = f"{MODELS[record['model']]}, batch {record['batch_size']}, over dense float32 torch"
    header = [first, "float32: dense, `cpvit-merge`", "int8: dense, `cpvit-merge`"]
    return _with_command(markdown(header, rows), record)


def quantisation(records: Loaded) -> str:
    """Ways to int8, dense and pruned: what they cost and what they gain."""
    return _quantisation(records["quantisation-deit-tiny"])


def quantisation_harder(records: Loaded) -> str:
    """The same at 50% of the MACs, in OpenVINO alone."""
    return _quantisation(records["quantisation-deit-tiny-50"])


def _quantisation(record: Any) -> str:
    rows = []
    for name in dict.fromkeys(row["name"] for row in record["rows"]):
        dense, pruned = (
            next(row for row in record["rows"] if row["name"] == name and row["pruned"] is pruned)
            for pruned in (False, True)
        )
        cells = (
            f"{row['kl']:.4f}, {row['agreement']:.3f}, {row['lost']:.2f}; {row['speedup']:.2f}x"
            for row in (dense, pruned)
        )
        rows.append([name, *cells])
    kept = f"`cpvit-merge` at {100 * record['macs']:.0f}% of the MACs"
    header = ["KL, agreement, top-1 points lost; speed over dense float32 torch", "dense", kept]
    return _with_command(markdown(header, rows), record)


def prefill(records: Loaded) -> str:
    """Prefill of vision-language models by the MACs that are left of the tower."""
    found = [records[name] for name in PREFILL]
    budgets = found[0]["arguments"]["macs"]
    rows = []
    for name, record in zip(PREFILL.values(), found, strict=True):
        dense, *pruned = record["rows"]
        cells = (
            f"{row['image_tokens']}; {_faster(dense, row, 'prefill')}; {_faster(dense, row, 'tower')}"
            for row in pruned
        )
        rows.append([name, f"{dense['image_tokens']}; {1e3 * median(dense['prefill']):.0f} ms", *cells])
    first = "image tokens; prefill over dense (10th to 90th percentile); tower alone"
    header = [first, "dense: image tokens; prefill", *(f"{100 * macs:.0f}% of the tower" for macs in budgets)]
    commands = "\n".join(record["made_by"]["command"] for record in found)
    return f"```\n{commands}\n```\n\n{_with_machine(markdown(header, rows), found)}"


def _faster(dense: Any, row: Any, part: str) -> str:
    ratios = [one / other for one, other in zip(dense[part], row[part], strict=True)]
    low, *_, high = quantiles(ratios, n=10)
    return f"{median(ratios):.2f}x ({low:.2f} to {high:.2f})"


def profile(records: Loaded) -> str:
    """Where a forward of one image spends its time, dense and pruned."""
    record = records["profile-deit-small"]
    dense, pruned = record["dense"], record["pruned"]
    rows = [
        [name, f"{dense['ms'][name]:.1f}", f"{pruned['ms'][name]:.1f}", _ratio(pruned, dense, name)]
        for name in dense["ms"]
    ]
    sums = [sum(side["ms"].values()) for side in (dense, pruned)]
    rows.append(["all", *(f"{value:.1f}" for value in sums), f"{sums[1] / sums[0]:.2f}"])
    rows.append(["operations started", str(dense["operations"]), str(pruned["operations"]), ""])
    kept = f"`{record['method']}` at {100 * record['macs_ratio']:.0f}% of the MACs"
    table = markdown(["ms of self time in a forward", "dense", kept, "ratio"], rows)
    return _with_command(table, record)


def training(records: Loaded) -> str:
    """Images a second of finetuning; pruned ones next to the faster of the dense ones."""
    record = records["training-speed"]
    speeds = {(row["dtype"], row["method"]): median(row["images_per_s"]) for row in record["rows"]}
    dtypes, methods = (tuple(dict.fromkeys(names)) for names in zip(*speeds, strict=True))
    dense = [method for method in methods if method.startswith("dense")]
    rows = [[name, *(f"{speeds[dtype, name]:.1f}" for dtype in dtypes)] for name in dense]
    for method in methods[len(dense) :]:
        found = [(speeds[dtype, method], max(speeds[dtype, name] for name in dense)) for dtype in dtypes]
        cells = [f"{speed:.1f} ({speed / fastest:.2f}x)" for speed, fastest in found]
        rows.append([f"`{method}` at {100 * record['macs']:.0f}% of the MACs", *cells])
    table = markdown(["images/s in training", *dtypes], rows)
    return _with_command(table, record)


def _with_command(table: str, record: Any) -> str:
    return f"```\n{record['made_by']['command']}\n```\n\n{_with_machine(table, [record])}"


def machine(records: Iterable[Any]) -> str:
    """Where and when the records were made; a record that was made elsewhere shows."""
    found = []
    for record in records:
        here = record["settings"][0]["environment"] if "settings" in record else record["environment"]
        versions = ", ".join(f"{name} {here['versions'][name]}" for name in ("torch", "timm"))
        day = record["made_by"]["time"][:10]
        found.append(f"{here['device_name']}, {here['threads']} threads, {versions}, {day}")
    return "; ".join(dict.fromkeys(found))


def _with_machine(table: str, records: Iterable[Any]) -> str:
    return f"{table}\n\nMeasured on: {machine(records)}."


def _settings(records: Loaded) -> list[Any]:
    return [setting for name in SPEED for setting in records[name]["settings"]]


def _chosen(settings: Sequence[Any], *, batch: int, dtype: str) -> list[Any]:
    return [one for one in settings if (one["batch_size"], one["environment"]["dtype"]) == (batch, dtype)]


def _cell(settings: Sequence[Any], dtype: str, method: str) -> str:
    found = [one for one in settings if one["environment"]["dtype"] == dtype]
    return _speed(_row(found[0], method)) if found else ""


def _row(setting: Any, name: str) -> Any:
    (row,) = [one for one in setting["rows"] if one["name"] == name]
    return row


def _in_runtime(record: Any, runtime: str, dtype: str, name: str) -> Any:
    """The row, or None where it could not be run (int8 in torch)."""
    asked = (runtime, dtype, name)
    return next((row for row in record["rows"] if (row["runtime"], row["dtype"], row["name"]) == asked), None)


def _speed(row: Any) -> str:
    """Median, spread and efficiency; where nine of ten rounds do not agree that it is faster, this is said."""
    spread = row["speedup"]
    figures = f"{spread['median']:.2f}x ({spread['p10']:.2f} to {spread['p90']:.2f}), {row['efficiency']:.2f}"
    return figures if spread["p10"] > 1 else f"{figures} (no gain)"


def _memory(setting: Any, row: Any) -> str:
    return f"{_mib(setting['dense'])}, {_mib(row['timing'])}"


def _mib(timing: Any) -> str:
    return f"{timing['peak_memory_mib']:.0f}"


def _ratio(pruned: Any, dense: Any, name: str) -> str:
    return f"{pruned['ms'][name] / dense['ms'][name]:.2f}"
