"""Tables of records that are not at hand, or that take hours: written from small ones of the same form."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from cpvit.export.benchmark import RuntimeComparison, RuntimeRow
from cpvit.machine.environment import Environment
from cpvit.measure.timings import Comparison, Latency, Row, Speedup, Timing
from cpvit.plans.plan import Plan
from evidence import comparisons, speed

HERE = Environment({"torch": "2.14", "timm": "1.0"}, "cpu", "A CPU", "float32", 2, 0)
PLAN = Plan("m", "cpvit", 196, 1, (100,) * 12, (3,) * 12)
LATENCY = Latency(10.0, 9.0, 11.0)


def timing(memory: float) -> Timing:
    return Timing(100.0, LATENCY, memory, 1000)


def row(name: str, speedup: float) -> Row:
    spread = Speedup(speedup, speedup - 0.1, speedup + 0.1)
    return Row(name, timing(169.4), spread, 0.6, speedup * 0.6, spread.verdict, PLAN)


def setting(model: str, batch: int, dtype: str, speedups: dict[str, float]) -> Comparison:
    rows = tuple(row(*one) for one in speedups.items())
    here = dataclasses.replace(HERE, dtype=dtype)
    return Comparison(model, batch, (224, 224), 9, timing(195.2), rows, (), 900.0, here)


def record(command: str, *settings: Comparison) -> Any:
    return _read(
        {
            "settings": [dataclasses.asdict(one) for one in settings],
            "failed": [],
            "made_by": {"command": f"cpvit {command}", "time": "2026-11-28T10:00:00+00:00"},
        }
    )


def _read(values: Any) -> Any:
    return json.loads(json.dumps(values))


def timed() -> dict[str, Any]:
    """A record for each model, both dtypes, of other speeds."""
    both = {"cpvit": 1.8, "cpvit-merge": 1.7}
    asked = {
        "speed-deit-small": ("deit_small_patch16_224", (1, 32)),
        "speed-deit-tiny": ("deit_tiny_patch16_224", (32,)),
        "speed-vit-base": ("vit_base_patch16_224", (8,)),
        "speed-vit-base-384": ("vit_base_patch16_384", (4,)),
    }
    return {
        name: record(
            name,
            *(
                setting(model, batch, dtype, both if dtype == "float32" else dict.fromkeys(both, 1.05))
                for dtype in ("float32", "bfloat16")
                for batch in batches
            ),
        )
        for name, (model, batches) in asked.items()
    }


def test_speed_of_every_model_with_spread_memory_and_machine() -> None:
    text = speed.whole(timed())
    assert text.startswith("```\ncpvit speed-deit-small\ncpvit speed-deit-tiny\n")
    cells = "1.80x (1.70 to 1.90), 1.08 | 1.05x (0.95 to 1.15), 0.63 (no gain) | 195, 169; 195, 169"
    assert f"| DeiT-Small 224 | 32 | `cpvit` | {cells} |" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + 5 * 2
    assert text.endswith("Measured on: A CPU, 2 threads, torch 2.14, timm 1.0, 2026-11-28.")


def test_the_short_table_has_a_row_for_each_of_its_settings() -> None:
    text = speed.short(timed())
    assert "| DeiT-Small 224, batch 1, `cpvit` | 1.80x (1.70 to 1.90), 1.08 | 1.05x" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + len(speed.README_ROWS)


def test_what_the_command_printed_is_printed_again() -> None:
    text = speed.output(timed())
    first = "images 224x224, deit_small_patch16_224, batch 32, float32 on cpu (A CPU, 2 threads), 9 rounds in turn"
    assert text.split("\n")[4] == first
    assert "cpvit-merge     100.0       10.0" in text


def test_schedules_stand_side_by_side() -> None:
    speeds = {"cpvit": 1.6, "cpvit:linear-ramp": 1.8, "cpvit-merge": 1.5, "cpvit-merge:constant": 1.4}
    made = {"speed-schedules": record("c", setting("m", 32, "float32", speeds))}
    text = speed.schedules(made)
    assert "| `cpvit` | 1.80x (1.70 to 1.90), 1.08, 169 MiB | 1.60x (1.50 to 1.70), 0.96, 169 MiB |" in text
    assert "| dense | 195 MiB | 195 MiB |" in text


def in_runtimes(dtypes: tuple[str, ...]) -> Any:
    rows = tuple(
        RuntimeRow(
            name,
            runtime,
            dtype,
            9.0,
            LATENCY,
            0.6,
            Speedup(gain, 1.1, 2.0),
            0.9,
            gain,
            PLAN if gain > 1 else None,
        )
        for runtime in ("torch", "onnxruntime", "openvino")
        for dtype in dtypes
        for name, gain in (("dense", 1.0), ("cpvit-merge", 1.5))
        if (runtime, dtype) != ("torch", "int8")
    )
    found = RuntimeComparison("deit_tiny_patch16_224", 16, (224, 224), 9, rows, (), HERE)
    made_by = {"command": "cpvit benchmark", "time": "2026-11-28T10:00:00+00:00"}
    return _read({**dataclasses.asdict(found), "made_by": made_by})


def test_runtimes_have_a_row_each_and_methods_a_column() -> None:
    lines = speed.runtimes({"speed-runtimes": in_runtimes(("float32",))}).splitlines()
    assert "| OpenVINO | 1.50x (1.10 to 2.00), 0.90 |" in lines
    assert lines[4].endswith("efficiency | `cpvit-merge` |")


def test_int8_leaves_out_what_could_not_be_run() -> None:
    text = speed.int8({"speed-int8": in_runtimes(("float32", "int8"))})
    assert "| torch | 1.00x, 1.50x | |" in text
    assert "| ONNX Runtime | 1.00x, 1.50x | 1.00x, 1.50x |" in text


def test_a_profile_is_summed_up() -> None:
    made_by = {"command": "python studies/profile_forward.py", "time": "2026-11-28T10:00:00+00:00"}
    made = {
        "method": "cpvit",
        "macs_ratio": 0.6,
        "dense": {"ms": {"linear": 40.0, "rest": 10.0}, "operations": 1200},
        "pruned": {"ms": {"linear": 26.0, "rest": 12.0}, "operations": 2500},
        "environment": dataclasses.asdict(HERE),
        "made_by": made_by,
    }
    text = speed.profile({"profile-deit-small": made})
    assert (
        "| linear | 40.0 | 26.0 | 0.65 |\n| rest | 10.0 | 12.0 | 1.20 |\n| all | 50.0 | 38.0 | 0.76 |" in text
    )


def test_draws_of_the_search_are_counted_and_averaged() -> None:
    def draw(curve: float, searched: float, agreement: float) -> dict[str, float]:
        return {"curve": curve, "searched": searched, "agreement": agreement, "curve_agreement": 0.95}

    draws = [draw(0.05, 0.04, 0.96), draw(0.05, 0.06, 0.94), draw(0.05, 0.05, 0.95)]
    made = {"budgets": [{"macs": 0.6, "draws": draws}], "made_by": {"command": "python studies/s.py"}}
    text = comparisons.seeds({"search-seeds-60": made, "search-seeds-50": {**made, "budgets": []}})
    row = "| 60% | 3 | 0.0500 ± 0.0000 | 0.0500 ± 0.0100 | 0.0000 ± 0.0100 | 1, 1, 1 | +0.00 ± 1.00 points |"
    assert text.splitlines()[-1] == row


def point(method: str, macs: float, right: str, agrees: str, **values: Any) -> dict[str, Any]:
    return {
        "method": method,
        "macs": macs,
        "macs_ratio": macs - 0.001,
        "top1": 100 * right.count("1") / len(right),
        "agreement": agrees.count("1") / len(agrees),
        "kl": 0.05,
        "outcomes": {"right": right, "agrees": agrees, "kl_error": 0.002},
        **values,
    }


def test_their_code_ours_and_the_best_stand_together() -> None:
    theirs, more = "1" * 80 + "0" * 20, "1" * 95 + "0" * 5
    shared = {"setting": "r = 8"}
    points = [
        point("ToMe", 0.6, theirs, "1" * 100, whose="theirs", **shared),
        point("ToMe", 0.6, theirs, "1" * 100, whose="ours", **shared, **NEAR),
        point("ToMe", 0.6, more, "1" * 100, whose="cpvit-merge", **shared),
    ]
    made = {
        "images": 100,
        "exact_images": 50,
        "dense_top1": 96.0,
        "points": points,
        "made_by": {"command": "c"},
    }
    records = {"rivals-deit-tiny": made, "rivals-diffrate-deit-tiny": {**made, "points": []}}
    rows = comparisons.rivals(records).splitlines()[-4:]
    assert [line.split(" | ")[1] for line in rows[1:]] == ["theirs", "ours", "ours"]
    assert rows[2].endswith("| 80.00 | the same |")
    assert rows[3].endswith("| 95.00 | more |")
    assert comparisons.same_as_rivals(records).endswith("| ToMe, r = 8 | 1e-14 | 7e-06 | 2e-02 | 1 |")


NEAR = {"float64": 1.1e-14, "difference_median": 7.1e-6, "difference": 0.021, "images_apart": 1}


def swept() -> dict[str, Any]:
    """Of 2000 images: `cpvit` loses 5 points, `cpvit-merge` none."""
    dense, worse = "1" * 1800 + "0" * 200, "1" * 1700 + "0" * 300
    plan = {"num_patches": 196, "patches_per_block": [196, 98, 49, 1]}
    points = [
        point(name, 0.6, right, right, plan=plan, top1_lost=(1800 - right.count("1")) / 20)
        for name, right in (("cpvit-merge", dense), ("tome", worse), ("cpvit", worse))
    ]
    made = {"images": 2000, "dense_top1": 90.0, "dense_right": dense, "points": points}
    made["made_by"] = {"command": "cpvit sweep"}
    return {"cifar10-deit-tiny": made, "cifar10-claim": made}


def test_the_claim_is_judged_by_what_the_images_can_tell() -> None:
    lines = comparisons.claim(swept()).splitlines()
    assert lines[2] == "| `cpvit-merge` | 75% | 40.1% | 0.00 ± 0.00 | yes |"
    assert lines[3] == "| `cpvit`, the paper's method | 75% | 40.1% | 5.00 ± 0.49 | **no** |"
    assert len(lines) == 4


def test_a_loss_near_a_point_is_not_decided_by_few_images() -> None:
    made = swept()
    sweep = made["cifar10-claim"]
    sweep["points"][0]["outcomes"]["right"] = "1" * 1784 + "0" * 216
    sweep["points"][0]["top1_lost"] = 0.8
    assert comparisons.claim(made).splitlines()[2].endswith("| 0.80 ± 0.20 | not decided by these images |")


def test_methods_on_another_data_set_are_compared_in_pairs() -> None:
    lines = comparisons.cifar10(swept()).splitlines()
    assert lines[-1].endswith("| 5.00 ± 0.49 | 0.850 (0.834 to 0.865) | 0.0500 ± 0.0020 | fewer |")


def test_training_is_compared_with_the_faster_dense_model() -> None:
    speeds = {"dense": [20, 21, 90], "dense, attention not fused": [28, 30, 29], "cpvit": [60, 58, 57]}
    rows = [{"dtype": "bfloat16", "method": name, "images_per_s": found} for name, found in speeds.items()]
    made_by = {"command": "python studies/training_speed.py", "time": "2026-11-29T10:00:00+00:00"}
    made = {"macs": 0.59, "rows": rows, "environment": dataclasses.asdict(HERE), "made_by": made_by}
    table = speed.training({"training-speed": _read(made)})
    assert "| dense | 21.0 |" in table
    assert "| `cpvit` at 59% of the MACs | 58.0 (2.00x) |" in table
