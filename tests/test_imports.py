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
    "timm_relpos": {"timm_vit"},
    "hf": {"hf_families", "hf_layer"},
    "hf_layer": {"hf_families"},
}
"""The one adapter that extends another, a ViT block with a bias; and the parts of the one for transformers."""
SHARED_COMMANDS = {"__init__", "common", "options", "tables"}


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


def test_schedules_are_pure_python() -> None:
    assert external("schedule.py") == {"cpvit"}
    assert own("schedule.py") <= {"macs"}


def test_plans_are_pure_python() -> None:
    assert external("plan.py") <= {"cpvit"}
    assert own("plan.py") <= {"methods"}


@pytest.mark.parametrize("adapter", sorted(set(ADAPTERS) - SHARED_ADAPTERS))
def test_an_adapter_knows_no_other_adapter(adapter: str) -> None:
    allowed = SHARED_ADAPTERS - {"__init__"} | BUILT_ON.get(adapter, set())
    assert modules_of(f"adapters/{adapter}.py", "adapters") <= allowed


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_know_the_core_and_attention_but_not_what_is_built_on_them(adapter: str) -> None:
    assert own(f"adapters/{adapter}.py") <= {"adapters", "attention", "core"}


@pytest.mark.parametrize("verb", sorted(set(VERBS) - SHARED_COMMANDS))
def test_a_verb_knows_no_other_verb(verb: str) -> None:
    parts = {name for name in VERBS if name.startswith(verb.split("_")[0] + "_")}
    assert modules_of(f"commands/{verb}.py", "commands") <= SHARED_COMMANDS - {"__init__"} | parts


@pytest.mark.parametrize("method", sorted(path.stem for path in (ROOT / "methods").glob("*.py")))
def test_methods_know_the_core_and_attention_but_no_model(method: str) -> None:
    assert own(f"methods/{method}.py") <= {"methods", "core", "attention"}


def test_nothing_in_the_library_knows_the_command_line() -> None:
    outer = {"cli", "commands", "seed"}
    for file in ROOT.rglob("*.py"):
        name = file.relative_to(ROOT)
        if name.parts[0].removesuffix(".py") not in outer:
            assert not own(str(name)) & outer, name


def test_the_data_knows_nothing_of_models() -> None:
    for file in (ROOT / "data").glob("*.py"):
        assert own(f"data/{file.name}") <= {"data"}


def test_no_two_top_level_modules_import_each_other() -> None:
    names = [path.stem for path in ROOT.glob("*.py") if path.stem != "__init__"]
    arrows = {name: own(f"{name}.py") for name in names}
    assert [(a, b) for a, b in permutations(names, 2) if b in arrows[a] and a in arrows[b]] == []


def test_importing_the_library_loads_nothing_heavy() -> None:
    heavy = ["transformers", "matplotlib", "sklearn", "tyro", "rich", "scipy"]
    code = f"import cpvit, sys; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
