"""Every published table: the page it stands in, the records it is made from, and the commands that make those."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evidence import comparisons, speed, tables
from evidence.records import Loaded, typed

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "records"
WEIGHTS = "deit_tiny_patch16_224.safetensors"
IMAGES = "imagenet-val-650.tar"
MODEL = f"--model deit_tiny_patch16_224 --checkpoint {WEIGHTS}"
DEIT_TINY = f"{MODEL} --data {IMAGES}"
EVERY_BUDGET = "0.95,0.9,0.8,0.7,0.6,0.5,0.4,0.3"


@dataclass(frozen=True)
class Record:
    """A file of ``records/``."""

    name: str
    command: str
    """What ``cpvit`` (or the study) is called with; ``--json`` is added. Files are named without their folder."""
    minutes: float
    """On two idle cores."""
    before: tuple[str, ...] = ()
    """Calls of ``cpvit`` that make files which the command needs, unless they lie in a folder of ``--inputs``."""
    study: str = ""
    """File of ``studies/`` that makes it, in the place of ``cpvit``."""

    @property
    def path(self) -> Path:
        return RECORDS / f"{self.name}.json"

    @property
    def arguments(self) -> list[str]:
        return shlex.split(self.command)

    @property
    def typed(self) -> str:
        """The command as one types it."""
        return typed(self.arguments, self.study)


@dataclass(frozen=True)
class Table:
    """What stands between two markers of a page."""

    name: str
    page: str
    records: tuple[str, ...]
    text: Callable[[Loaded], str]


@dataclass(frozen=True)
class Check:
    """A record, and a cheaper command that must find the same as one of its rows."""

    record: str
    method: str
    macs: float
    command: str


ALL_RECORDS: tuple[Record, ...] = (
    Record("eval-deit-tiny", f"eval {DEIT_TINY} --method cpvit-merge --macs 0.6", 0.6),
    Record(
        "methods-deit-tiny",
        f"sweep {DEIT_TINY} --methods cpvit-merge,tome,cpvit,cpvit:linear-ramp --macs 0.6",
        1.2,
    ),
    Record(
        "layer-aware-deit-tiny",
        f"eval {DEIT_TINY} --method cpvit --macs 0.6 --calibration {IMAGES}",
        0.6,
    ),
    Record(
        "heads-deit-tiny",
        f"eval {DEIT_TINY} --method cpvit --macs 0.6 --head-keep-rate 0.8 --calibration {IMAGES}",
        0.6,
    ),
    Record(
        "budgets-deit-tiny",
        f"sweep {DEIT_TINY} --leave-out 128 --methods cpvit-merge,tome:curve,tome,pitome:curve,pitome,cpvit "
        f"--macs {EVERY_BUDGET}",
        8,
    ),
)

INT8 = f"--to openvino --int8 --with-preprocessing --calibration {IMAGES} --out deit.xml"
EXPORT = f"export {MODEL} {INT8}"
EXPORTED = f"eval --exported deit.xml --data {IMAGES} --leave-out 128 {MODEL}"
ALL_RECORDS += (
    Record(
        "escalation-deit-tiny",
        f"eval {DEIT_TINY} --leave-out 128 --plan pair.json",
        3,
        (f"plan {DEIT_TINY} --limit 128 --min-agreement 0.995 --escalate --out pair.json",),
    ),
    Record("int8-dense", EXPORTED, 2, (f"{EXPORT} --dense",)),
    Record("int8-60", EXPORTED, 3, (f"{EXPORT} --method cpvit-merge --macs 0.6",)),
    Record("int8-50", EXPORTED, 3, (f"{EXPORT} --method cpvit-merge --macs 0.5",)),
)

TIMED = "benchmark --macs 0.6 --model"
BOTH = "--dtypes float32,bfloat16"
ALL_RECORDS += (
    Record(
        "speed-deit-small",
        f"{TIMED} deit_small_patch16_224 --methods cpvit,cpvit-merge,tome --batch-sizes 1,32 {BOTH} --seconds 35",
        5,
    ),
    Record(
        "speed-deit-tiny",
        f"{TIMED} deit_tiny_patch16_224 --methods cpvit,cpvit-merge,tome --batch-sizes 1,32 {BOTH} --seconds 15",
        3,
    ),
    Record(
        "speed-vit-base",
        f"{TIMED} vit_base_patch16_224 --methods cpvit,cpvit-merge --batch-sizes 8 {BOTH} --seconds 30",
        3,
    ),
    Record(
        "speed-vit-base-384",
        f"{TIMED} vit_base_patch16_384 --methods cpvit,cpvit-merge --batch-sizes 4 {BOTH} --seconds 40",
        4,
    ),
    Record(
        "speed-schedules",
        f"{TIMED} deit_small_patch16_224 --methods cpvit,cpvit:linear-ramp,cpvit-merge,cpvit-merge:constant "
        "--batch-size 32 --dtypes float32 --align none --seconds 60",
        2,
    ),
    Record(
        "speed-runtimes",
        f"{TIMED} deit_small_patch16_224 --methods cpvit,cpvit-merge,tome --batch-size 8 "
        "--runtimes torch,onnxruntime,openvino --seconds 60",
        4,
    ),
    Record(
        "speed-int8",
        f"{TIMED} deit_tiny_patch16_224 --methods cpvit-merge --batch-size 16 --runtimes onnxruntime,openvino "
        "--dtypes float32,int8 --seconds 40",
        4,
    ),
    Record(
        "quantisation-deit-tiny",
        f"--checkpoint {WEIGHTS} --data {IMAGES} --seconds 60",
        13,
        study="quantisation",
    ),
    Record(
        "quantisation-deit-tiny-50",
        f"--checkpoint {WEIGHTS} --data {IMAGES} --macs 0.5 --runtimes openvino --seconds 60",
        6,
        study="quantisation",
    ),
    *(
        Record(
            name,
            f"--family {name.removeprefix('vlm-')} --shrink 4 --macs 0.8 0.6 0.4 --seconds 45",
            1,
            study="vlm_prefill",
        )
        for name in speed.PREFILL
    ),
    Record("profile-deit-small", "--model deit_small_patch16_224 --macs 0.6", 0.5, study="profile_forward"),
)

SEEDS = f"--checkpoint {WEIGHTS} --data {IMAGES} --draws 10 --trials 40"
ALL_RECORDS += (
    Record("search-seeds-60", f"{SEEDS} --macs 0.6", 60, study="search_seeds"),
    Record("search-seeds-50", f"{SEEDS} --macs 0.5", 60, study="search_seeds"),
)

SAME = f"--checkpoint {WEIGHTS} --data {IMAGES}"
ALL_RECORDS += (
    Record("rivals-deit-tiny", f"{SAME} --tome ToMe --pitome PiToMe", 10, study="rivals"),
    Record("rivals-diffrate-deit-tiny", f"{SAME} --diffrate DiffRate", 3, study="rivals"),
    Record("released-deit-tiny", SAME, 4, study="released_code"),
)

CIFAR = "--model deit_tiny_patch16_224 --data cifar10-jpeg.tar.gz"
RECIPE = f"finetune {CIFAR} --layer-decay 0.75 --crop-scale 0.6 1.0 --dtype bfloat16 --eval-limit 1000"
ON_CIFAR = f"{CIFAR} --num-classes 10 --checkpoint cifar10/last/model.safetensors"
TRAINING = (
    f"{RECIPE} --dense --checkpoint {WEIGHTS} --image-size 112 --batch-size 128 --num-steps 2340 --learning-rate 5e-4 "
    "--workers 1 --checkpoint-every 195 --eval-every 390 --output-dir dense-112",
    f"{RECIPE} --dense --checkpoint dense-112/last/model.safetensors --num-steps 400 --learning-rate 3e-4 --seed 1 "
    "--output-dir cifar10",
)
TRAINED_ON = (
    f"{RECIPE} --checkpoint cifar10/last/model.safetensors --num-steps 500 --learning-rate 3e-4 --seed 2"
)
CLAIM_BUDGETS = {"59": "0.59", "50": "0.5"}
ALL_RECORDS += (
    Record(
        "cifar10-deit-tiny",
        f"sweep {ON_CIFAR} --limit 2000 --methods cpvit-merge,tome,cpvit --macs 0.7,0.6,0.5",
        10,
        TRAINING,
    ),
    Record(
        "cifar10-finetuned",
        "--data cifar10-jpeg.tar.gz --start cifar10/last --control ft-control/last "
        "--pruned ft-cpvit59/last ft-cpvit50/last ft-merge59/last ft-merge50/last",
        150,
        (
            *TRAINING,
            f"{TRAINED_ON} --dense --output-dir ft-control",
            *(
                f"{TRAINED_ON} --method {method} --macs {macs} --output-dir ft-{name}{budget}"
                for budget, macs in CLAIM_BUDGETS.items()
                for name, method in (("cpvit", "cpvit"), ("merge", "cpvit-merge"))
            ),
        ),
        study="finetuned_claim",
    ),
    Record("cifar10-claim", f"sweep {ON_CIFAR} --methods cpvit-merge,cpvit --macs 0.59,0.5", 20, TRAINING),
    Record(
        "training-speed", "--data cifar10-jpeg.tar.gz --batch-size 32 --steps 4", 5, study="training_speed"
    ),
)

ALL_TABLES = (
    Table("escalation", "README.md", ("escalation-deit-tiny",), tables.escalation),
    Table("int8", "README.md", ("int8-dense", "int8-60", "int8-50"), tables.int8),
    Table("eval", "README.md", ("eval-deit-tiny",), tables.evaluation),
    Table(
        "methods",
        "README.md",
        ("methods-deit-tiny", "layer-aware-deit-tiny", "heads-deit-tiny"),
        tables.methods,
    ),
    Table("budgets", "README.md", ("budgets-deit-tiny",), tables.budgets),
    Table("cheapest", "README.md", ("budgets-deit-tiny",), tables.cheapest),
    Table("all-budgets", "docs/accuracy.md", ("budgets-deit-tiny",), tables.all_budgets),
    Table("cifar10", "docs/accuracy.md", ("cifar10-deit-tiny",), comparisons.cifar10),
    Table("claim", "docs/finetune.md", ("cifar10-claim",), comparisons.claim),
    Table("finetuned", "README.md", ("cifar10-finetuned",), comparisons.claim_finetuned),
    Table("claim-finetuned", "docs/finetune.md", ("cifar10-finetuned",), comparisons.claim_finetuned),
    Table("training-speed", "README.md", ("training-speed",), speed.training),
    Table("seeds", "docs/accuracy.md", ("search-seeds-60", "search-seeds-50"), comparisons.seeds),
    Table(
        "rivals", "docs/accuracy.md", ("rivals-deit-tiny", "rivals-diffrate-deit-tiny"), comparisons.rivals
    ),
    Table("released", "docs/accuracy.md", ("released-deit-tiny",), comparisons.released),
    Table("same-as-rivals", "docs/accuracy.md", ("rivals-deit-tiny",), comparisons.same_as_rivals),
    Table("speed-output", "README.md", ("speed-deit-small",), speed.output),
    Table("speed-short", "README.md", speed.SPEED, speed.short),
    Table("speed", "docs/speed.md", speed.SPEED, speed.whole),
    Table("speed-schedules", "docs/speed.md", ("speed-schedules",), speed.schedules),
    Table("profile", "docs/speed.md", ("profile-deit-small",), speed.profile),
    Table("speed-runtimes", "docs/export.md", ("speed-runtimes",), speed.runtimes),
    Table("speed-int8", "docs/export.md", ("speed-int8",), speed.int8),
    Table("prefill", "docs/models.md", tuple(speed.PREFILL), speed.prefill),
    Table("quantisation", "docs/export.md", ("quantisation-deit-tiny",), speed.quantisation),
    Table("quantisation-50", "docs/export.md", ("quantisation-deit-tiny-50",), speed.quantisation_harder),
)

CHECKS = (
    Check(
        "methods-deit-tiny",
        "cpvit-merge",
        0.6,
        f"eval {DEIT_TINY} --method cpvit-merge --macs 0.6",
    ),
)

NOT_MADE: dict[str, str] = {}
"""Records that were not made yet, and why: the places of their tables keep the text they hold. A record that is made is
taken off this list."""

NO_MEASUREMENT = "describes, measures nothing"
COUNTED = "counted by the studies named beside it, which write no record"
TYPED: dict[str, tuple[tuple[str, str], ...]] = {
    "README.md": (("| command | what it does |", NO_MEASUREMENT),),
    "docs/export.md": (("| `--to` | file | runs in | needs |", NO_MEASUREMENT),),
    "docs/finetune.md": (("| | |", NO_MEASUREMENT),),
    "docs/models.md": (
        ("| library | command | models | pruned | refused | not built |", COUNTED),
        ("| architectures | tower | reason given |", COUNTED),
        ("| classes | reason given |", COUNTED),
        ("| code | what is given to `prune_` |", NO_MEASUREMENT),
    ),
}
"""Tables with numbers that no record stands behind, by page: first line, and why."""
