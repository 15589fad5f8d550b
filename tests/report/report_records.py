"""Records as ``--json`` writes them, small and made up."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

ENVIRONMENT = {
    "versions": {"python": "3.11.7", "torch": "2.14.1"},
    "device": "cpu",
    "device_name": "some CPU",
    "dtype": "float32",
    "threads": 2,
    "seed": 0,
}
HOSTILE = "<script>alert(1)</script>/\"><img src=x onerror=alert(2)>'{{ 7*7 }}.png"


def plan(method: str = "cpvit-merge", macs: float = 0.6, heads: Any = None) -> dict[str, Any]:
    return {
        "model": "tiny",
        "method": method,
        "num_patches": 4,
        "num_prefix": 1,
        "patches_per_block": [4, 3, 2],
        "num_heads": [3, 3, 3],
        "heads": heads,
        "schedule": "curve",
        "macs_ratio": macs,
    }


def jpeg(side: int = 16) -> str:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (200, 80, 40)).save(stream, "JPEG")
    return base64.b64encode(stream.getvalue()).decode()


def answer(index: int, name: str | None = None) -> dict[str, Any]:
    return {"index": index, "probability": 0.75, "name": name}


def difference(image: str) -> dict[str, Any]:
    return {"image": image, "label": 1, "label_name": "bee", "dense": answer(1, "bee"), "pruned": answer(2)}


def trace(image: str, *, merged: bool) -> dict[str, Any]:
    blocks = ["0 1 2 3", "0 0 1 2", "0 0 1 1"] if merged else ["0 1 2 3", "0 -1 1 2", "0 -1 1 -1"]
    return {"image": image, "answer": answer(2), "blocks": blocks}


def examples(image: str) -> dict[str, Any]:
    shown = {"image": image, "label": 1, "label_name": "bee", "answer": answer(1, "bee")}
    return {"grid": [2, 2], "gallery": [shown], "pictures": {image: jpeg()}}


def point(method: str, macs: float, top1: float, image: str) -> dict[str, Any]:
    return {
        "method": method,
        "macs": macs,
        "macs_ratio": macs,
        "top1": top1,
        "top5": 95.0,
        "top1_lost": 80 - top1,
        "agreement": 0.9,
        "kl": 0.02,
        "schedule": "curve",
        "plan": plan(method, macs),
        "disagreements": [difference(image)],
        "traces": [trace(image, merged=method != "cpvit")],
    }


def sweep_record(image: str = "a/1.png", model: str = "tiny") -> dict[str, Any]:
    points = [
        ("cpvit-merge", 0.6, 79.0),
        ("cpvit-merge", 0.5, 75.0),
        ("tome", 0.6, 78.0),
        ("cpvit", 0.7, 77.0),
    ]
    return {
        "model": model,
        "images": 100,
        "dense_top1": 80.0,
        "dense_top5": 95.0,
        "dense_macs": 1_000_000,
        "points": [point(method, macs, top1, image) for method, macs, top1 in points],
        "environment": ENVIRONMENT,
        "examples": examples(image),
        "made_by": {
            "record": "SweepResult",
            "command": f"cpvit sweep --data '{image}'",
            "time": "2030-01-02T03:04:05+00:00",
        },
    }


def old_sweep_record() -> dict[str, Any]:
    """As written before records had single images and the command."""
    record = sweep_record()
    for name in ("examples", "made_by"):
        del record[name]
    for one in record["points"]:
        del one["disagreements"], one["traces"]
    return record


def eval_record(image: str = "a/1.png") -> dict[str, Any]:
    side = {"top1": 80.0, "top5": 95.0, "macs": 1_000_000, "params": 5_000}
    more = {"tokens_per_block": [5, 4, 3], "heads_per_block": [3, 3, 3]}
    return {
        "model": "tiny",
        "dense": side,
        "pruned": {**side, "top1": 78.5, **more},
        "macs_ratio": 0.6,
        "agreement": 0.95,
        "kl": 0.01,
        "images": 100,
        "images_skipped": 0,
        "skipped": [],
        "plan": plan(heads=[[0, 1, 2], [0, 2], [1]]),
        "environment": ENVIRONMENT,
        "escalation": None,
        "disagreements": [difference(image)],
        "traces": [trace(image, merged=True)],
        "examples": examples(image),
    }


def timing(rate: float) -> dict[str, Any]:
    latency = {"median": 1000 / rate, "p10": 900 / rate, "p90": 1100 / rate}
    return {"images_per_s": rate, "latency_ms": latency, "peak_memory_mib": 100.0, "macs": 10}


def comparison() -> dict[str, Any]:
    return {
        "model": "tiny",
        "batch_size": 4,
        "image_size": [32, 32],
        "rounds": 7,
        "dense": timing(10.0),
        "rows": [
            {
                "name": "tome",
                "timing": timing(15.0),
                "speedup": {"median": 1.5, "p10": 1.4, "p90": 1.6},
                "macs_ratio": 0.6,
                "efficiency": 0.9,
                "verdict": "faster",
                "plan": plan("tome"),
            }
        ],
        "unfit": [],
        "peak_memory_mib": 300.0,
        "environment": ENVIRONMENT,
        "end_to_end": False,
    }


def benchmarks_record() -> dict[str, Any]:
    return {"settings": [comparison()], "failed": ["random at batch 4, float16: no such kernel"]}


def benchmark_record() -> dict[str, Any]:
    record = comparison()
    row = record.pop("rows")[0]
    del record["unfit"]
    more = {"pruned": row["timing"], "speedup": 1.5, "speedup_by_round": row["speedup"], "plan": row["plan"]}
    return record | more | {"macs_ratio": 0.6, "efficiency": 0.9, "verdict": "faster"}


def runtimes_record() -> dict[str, Any]:
    row = {
        "name": "dense",
        "runtime": "openvino",
        "dtype": "int8",
        "images_per_s": 20.0,
        "latency_ms": {"median": 50.0, "p10": 49.0, "p90": 52.0},
        "macs_ratio": 1.0,
        "speedup": {"median": 1.0, "p10": 1.0, "p90": 1.0},
        "efficiency": 1.0,
        "in_all": 1.28,
        "plan": None,
    }
    keys = ("model", "batch_size", "image_size", "rounds", "unfit", "environment")
    return {name: value for name, value in comparison().items() if name in keys} | {"rows": [row]}


def finetune_record(steps: int = 1000) -> dict[str, Any]:
    evaluations = [
        {"step": at, "top1": 50.0 + at / 100, "top5": 90.0, "loss": 1.0, "images": 10} for at in (0, steps)
    ]
    history = {"loss": [2.0 - at / steps for at in range(steps)], "learning_rate": [0.1] * steps}
    history["loss"][3] = None  # type: ignore[call-overload]
    return {
        "model": "tiny",
        "plan": plan(),
        "config": {"num_steps": steps},
        "evaluations": evaluations,
        "history": history,
        "images_per_s": 12.0,
        "seconds": 60.0,
        "environment": ENVIRONMENT,
    }


def export_record() -> dict[str, Any]:
    described = {"format": "onnx", "precision": "float32", "model": "tiny", "plan": plan()}
    parity = {"agreement": 1.0, "kl": 1e-9}
    return {
        "path": "tiny.onnx",
        "description": described,
        "parity": parity,
        "bytes": 1_500_000,
        "seconds": 2.0,
    }


def exported_eval_record() -> dict[str, Any]:
    described = {"format": "openvino", "precision": "int8", "model": "tiny", "plan": plan()}
    dense = {"top1": 80.0, "top5": 95.0, "agreement": 0.97, "kl": 0.02}
    sides = {"top1": 79.5, "top5": 95.0, "images": 100, "dense": dense}
    return {"path": "tiny.xml", "description": described, "environment": ENVIRONMENT, **sides}


def search_record() -> dict[str, Any]:
    return {"plan": plan(), "kl": 0.01, "start_kl": 0.02, "evaluations": 40}


def timed_search_record() -> dict[str, Any]:
    speedup = {"median": 1.5, "p10": 1.4, "p90": 1.6}
    return {"tuned": search_record(), "speedup": speedup, "searches": 1, "environment": ENVIRONMENT}


def pair() -> dict[str, Any]:
    return {"light": plan(macs=0.5), "second": None, "margin": 0.3}


def escalation_record() -> dict[str, Any]:
    return {"found": pair(), "macs_ratio": 0.7, "agreement": 0.99, "share": 0.2, "static_macs_ratio": None}


def saved_eval_record() -> dict[str, Any]:
    record = eval_record()
    return {name: record[name] for name in ("model", "pruned", "images", "plan", "environment")}


ALL = {
    "sweep": sweep_record,
    "eval": eval_record,
    "saved eval": saved_eval_record,
    "exported eval": exported_eval_record,
    "export": export_record,
    "benchmark": benchmark_record,
    "benchmarks": benchmarks_record,
    "comparison": comparison,
    "runtimes": runtimes_record,
    "finetune": finetune_record,
    "search": search_record,
    "timed search": timed_search_record,
    "escalation": escalation_record,
    "pair": pair,
    "plan": plan,
}
"""By kind, what makes one."""
