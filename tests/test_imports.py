"""Who may import whom. Read from the source, so that an import inside a function counts as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest

import cpvit

ROOT = Path(cpvit.__file__).parent
ADAPTERS = sorted(path.stem for path in (ROOT / "adapters").glob("*.py"))
VERBS = sorted(path.stem for path in (ROOT / "commands").glob("*.py"))
SHARED_ADAPTERS = {"__init__", "host", "refusals", "common"}
BUILT_ON = {
    "timm_beit": {"timm_vit"},
    "timm_eva": {"timm_vit"},
    "timm_relpos": {"timm_vit"},
    "open_clip": {"torchvision_vit"},
    "dinov2": {"timm_vit"},
    "hf": {"hf_families", "hf_layer", "hf_parts", "hf_tower"},
    "hf_layer": {"hf_parts"},
    "hf_tower": {"hf_parts"},
}
"""The adapters that extend the block of another, and the parts of the one for transformers."""
SHARED_COMMANDS = {"__init__", "common", "options", "records", "tables", "terminal", "bulk", "bulk_options"}
FLOORS = (
    "files",
    "attention",
    "core",
    "methods",
    "kernels",
    "adapters",
    "plans",
    "machine",
    "pruning",
    "weights",
    "multimodal",
    "data",
    "measure",
    "pictures",
    "report",
    "export",
    "tuning",
    "finetune",
    "bulk",
    "demo",
    "app",
    "commands",
)
"""From the ground up: a room imports from those below it."""
OUTSIDE = {"__init__", "__main__", "_moved"}
ENTRY_POINTS = {"_moved.py", "__main__.py", "demo/train.py", "commands/cli.py", "commands/original.py"}
MOST_ARGUMENTS = {"run_block": 9}
"""The algorithm's own step: an options value would hide what it depends on."""


def imports(file: str) -> set[str]:
    """Full names of the modules that a file of the package imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found |= {node.module or ""}
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def modules_of(file: str, inside: str) -> set[str]:
    """Modules of one subpackage that a file imports."""
    names = {path.stem for path in (ROOT / inside).glob("*.py")}
    return {name for name in names if f"cpvit.{inside}.{name}" in imports(file)}


def external(file: str) -> set[str]:
    return {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names)


def own(file: str) -> set[str]:
    """Modules of the package that a file imports."""
    top = {path.stem for path in ROOT.iterdir()}
    parts = [name.split(".") for name in imports(file) if name.startswith("cpvit.")]
    return {part[1] for part in parts if part[1] in top}


def test_the_core_knows_attention_and_torch_only() -> None:
    assert own("core.py") == {"attention"}
    assert external("core.py") == {"cpvit", "torch"}


def test_attention_knows_torch_only() -> None:
    assert own("attention.py") == set()
    assert external("attention.py") == {"torch"}


@pytest.mark.parametrize("file", ["schedules", "budget", "plan", "config", "check", "steps"])
def test_values_and_arithmetic_need_no_tensors(file: str) -> None:
    assert external(f"plans/{file}.py") <= {"cpvit"}


@pytest.mark.parametrize("adapter", sorted(set(ADAPTERS) - SHARED_ADAPTERS))
def test_an_adapter_knows_no_other_adapter(adapter: str) -> None:
    allowed = SHARED_ADAPTERS - {"__init__"} | BUILT_ON.get(adapter, set())
    assert modules_of(f"adapters/{adapter}.py", "adapters") <= allowed


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_know_the_core_and_attention_but_not_what_is_built_on_them(adapter: str) -> None:
    assert own(f"adapters/{adapter}.py") <= {"adapters", "attention", "core"}


@pytest.mark.parametrize("verb", sorted(set(VERBS) - SHARED_COMMANDS - {"cli", "original"}))
def test_a_verb_knows_no_other_verb(verb: str) -> None:
    parts = {name for name in VERBS if name.startswith(verb.split("_")[0] + "_")}
    assert modules_of(f"commands/{verb}.py", "commands") <= SHARED_COMMANDS - {"__init__"} | parts


@pytest.mark.parametrize("method", sorted(path.stem for path in (ROOT / "methods").glob("*.py")))
def test_methods_know_the_core_and_attention_but_no_model(method: str) -> None:
    assert own(f"methods/{method}.py") <= {"methods", "core", "attention"}


def test_imports_between_rooms_point_one_way() -> None:
    """What an image meets, what decides the pruning, what is measured, where models come from, what people start."""
    for file in ROOT.rglob("*.py"):
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if room not in OUTSIDE:
            above = set(FLOORS[FLOORS.index(room) + 1 :]) | OUTSIDE
            assert not own(str(file.relative_to(ROOT))) & above, file


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms == set(FLOORS) | OUTSIDE


def test_the_data_knows_nothing_of_models() -> None:
    for file in (ROOT / "data").glob("*.py"):
        assert own(f"data/{file.name}") <= {"data"}


def test_no_two_modules_of_a_room_import_each_other() -> None:
    for room in (path for path in ROOT.iterdir() if path.is_dir()):
        files = [path.stem for path in room.glob("*.py") if path.stem != "__init__"]
        arrows = {name: modules_of(f"{room.name}/{name}.py", room.name) for name in files}
        assert [(a, b) for a, b in permutations(files, 2) if b in arrows[a] and a in arrows[b]] == []


def test_every_module_is_imported_by_another_or_is_an_entry_point() -> None:
    files = {path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path.stem != "__init__"}
    names = {".".join(("cpvit", *file.with_suffix("").parts)): file for file in files}
    imported = {name for path in ROOT.rglob("*.py") for name in imports(str(path.relative_to(ROOT)))}
    assert {str(names[name]) for name in set(names) - imported} <= ENTRY_POINTS


def test_a_model_is_opened_in_public_functions_only() -> None:
    """Everything below them takes the opened host; a call in a private function is a second opening."""
    callers: list[str] = []
    for file in ROOT.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef):
                callers += [f"{file.name}: {function.name}" for _ in calls(function, "open_host")]
    assert not [caller for caller in callers if ": _" in caller]
    assert len(callers) < 12, callers


def calls(function: ast.FunctionDef, name: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def test_no_public_function_takes_more_than_eight_arguments() -> None:
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                names = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs) if arg.arg != "self"]
                assert len(names) <= MOST_ARGUMENTS.get(node.name, 8), (file.name, node.name, names)


def test_importing_the_library_loads_nothing_heavy() -> None:
    heavy = [
        "transformers",
        "vl_convert",
        "jinja2",
        "matplotlib",
        "sklearn",
        "tyro",
        "rich",
        "scipy",
        "gradio",
    ]
    code = f"import cpvit, sys; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
