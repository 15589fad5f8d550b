"""The published figures: every page says what its records say, and every record can be made again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from packaging.version import Version
from safetensors.torch import save_file

from cpvit.commands.cli import commands, parse
from evidence import pages
from evidence.__main__ import compare, main, texts
from evidence.catalog import ALL_RECORDS, ALL_TABLES, CHECKS, NOT_MADE, RECORDS, ROOT, TYPED, Record
from evidence.intervals import differ, interval, lost_error
from evidence.records import load, run

PAGES = sorted({*TYPED, *(table.page for table in ALL_TABLES)})


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_its_records_say(page: str) -> None:
    text = (ROOT / page).read_text()
    assert text == pages.written(text, texts()), "run python -m evidence --write"


def test_every_table_has_a_place_and_every_place_a_table() -> None:
    expected = {(table.page, table.name) for table in ALL_TABLES}
    found = {(page, name) for page in PAGES for name in pages.names((ROOT / page).read_text())}
    assert found == expected


@pytest.mark.parametrize("page", PAGES)
def test_no_other_table_with_numbers_is_typed_in(page: str) -> None:
    assert pages.typed_tables((ROOT / page).read_text()) == [header for header, _ in TYPED.get(page, ())]


MADE = [record for record in ALL_RECORDS if record.name not in NOT_MADE]


@pytest.mark.parametrize("record", MADE, ids=lambda record: record.name)
def test_a_record_was_made_by_its_command(record: Record) -> None:
    assert load(record.path)["made_by"]["command"] == record.typed


@pytest.mark.parametrize("record", ALL_RECORDS, ids=lambda record: record.name)
def test_the_command_of_a_record_still_parses(record: Record) -> None:
    for call in record.before:
        parse(commands(), call.split(), prog="cpvit")
    if record.study:
        study(record.study).parser().parse_args(record.arguments)
    else:
        parse(commands(), record.arguments, prog="cpvit")


def study(name: str) -> Any:
    """A file of ``studies/``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "studies" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_models_that_were_trained_otherwise_are_not_compared(tmp_path: Path) -> None:
    facts = {"num_steps": 500, "checkpoint": "sha", "pruning": "dense"}
    runs = {
        "control": facts,
        "alike": {**facts, "pruning": {"macs": 0.5}},
        "longer": {**facts, "num_steps": 900},
    }
    for name, found in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps({"facts": found}))
    control, alike, longer = (tmp_path / name / "last" for name in runs)
    compared = study("finetuned_claim")
    compared.trained_alike(control, [alike])
    with pytest.raises(SystemExit, match=r"longer.last was trained otherwise than .*control.last: num_steps"):
        compared.trained_alike(control, [alike, longer])


def test_an_advisory_is_about_the_versions_in_its_ranges_and_lists() -> None:
    audit = study("audit_dependencies")
    events = [{"introduced": "0"}, {"fixed": "2.0"}, {"introduced": "3.0"}, {"last_affected": "3.1"}]
    entry = {"ranges": [{"type": "ECOSYSTEM", "events": events}], "versions": ["5.0"]}
    found = [text for text in ("1.0", "2.0", "3.1", "3.2", "5.0") if audit.affects(entry, Version(text))]
    assert found == ["1.0", "3.1", "5.0"]
    assert not audit.affects({"ranges": [{"type": "GIT", "events": events}]}, Version("1.0"))


def test_there_is_no_record_that_no_table_is_made_from() -> None:
    assert {path.stem for path in RECORDS.glob("*.json")} == {record.name for record in MADE}, (
        "a record that is made is taken off NOT_MADE in evidence/catalog.py"
    )
    assert {name for table in ALL_TABLES for name in table.records} == {record.name for record in ALL_RECORDS}
    assert set(NOT_MADE) <= {record.name for record in ALL_RECORDS}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.record)
def test_a_check_repeats_a_row_of_its_record(check: Any) -> None:
    points = load(RECORDS / f"{check.record}.json")["points"]
    assert [(p["method"], p["macs"]) for p in points].count((check.method, check.macs)) == 1
    parse(commands(), check.command.split(), prog="cpvit")


def test_records_hold_no_path_of_a_machine() -> None:
    for record in MADE:
        assert "/tmp" not in record.path.read_text()
        assert "/home" not in record.path.read_text()


POINT = {"top1": 80.0, "agreement": 0.9, "kl": 0.1, "macs_ratio": 0.6, "plan": {"patches_per_block": [4, 2]}}


def again(**changes: Any) -> Any:
    return {**POINT, "pruned": {"top1": changes.pop("top1", 80.0)}, **changes}


def test_a_repeated_row_may_differ_by_rounding_alone() -> None:
    assert compare(POINT, again(top1=80.2, kl=0.1004, agreement=0.903), "row") == []
    found = compare(
        POINT, again(top1=79, kl=0.11, macs_ratio=0.61, plan={"patches_per_block": [4, 3]}), "row"
    )
    assert [line.split(": ")[1].split()[0] for line in found] == ["patches", "MACs", "top1", "kl"]


def test_a_missing_input_is_named_with_the_option_that_gives_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors is in none of .*--inputs"):
        run(["eval", "--checkpoint", "w.safetensors"], [], [tmp_path])


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no table or record is called nonsense; there are .*budgets, "):
        main(["nonsense"])


def test_a_record_is_written_by_the_command_line(tmp_path: Path, tiny_tar: Path) -> None:
    (tmp_path / "tiny.tar").write_bytes(tiny_tar.read_bytes())
    model = timm.create_model("test_vit", num_classes=3)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    asked = "--model test_vit --num-classes 3 --checkpoint tiny.safetensors --data tiny.tar"
    command = f"eval {asked} --method tome --macs 0.8 --batch-size 4"
    record = json.loads(run(command.split(), [], [tmp_path]))
    assert record["made_by"]["command"] == f"cpvit {command}"
    assert record["plan"]["method"] == "tome"


def test_what_a_call_before_makes_is_taken_from_the_folders_if_it_is_there(
    tmp_path: Path, tiny_tar: Path
) -> None:
    (tmp_path / "tiny.tar").write_bytes(tiny_tar.read_bytes())
    model = timm.create_model("test_vit", num_classes=3)
    (tmp_path / "run" / "best").mkdir(parents=True)
    save_file(model.state_dict(), tmp_path / "run" / "best" / "model.safetensors")
    asked = "--model test_vit --num-classes 3 --checkpoint run/best/model.safetensors --data tiny.tar"
    command = f"eval {asked} --method tome --macs 0.8 --batch-size 4"
    record = json.loads(run(command.split(), [["this", "is", "not", "called"]], [tmp_path]))
    assert record["made_by"]["command"] == f"cpvit {command}"


def test_a_table_that_waits_for_its_record_keeps_its_text() -> None:
    page = "a\n<!-- evidence: one -->\nold\n<!-- /evidence -->\nb\n"
    assert pages.written(page, {"one": None}) == page


def test_markers_are_filled_and_kept() -> None:
    page = "a\n<!-- evidence: one -->\nold\n<!-- /evidence -->\nb\n"
    filled = pages.written(page, {"one": "| 1 |"})
    assert filled == "a\n<!-- evidence: one -->\n| 1 |\n<!-- /evidence -->\nb\n"
    assert pages.written(filled, {"one": "| 1 |"}) == filled
    with pytest.raises(KeyError):
        pages.written(page, {})


def test_a_typed_table_with_a_number_is_seen() -> None:
    page = "| a | b |\n|---|---|\n| x | 1 |\n\n| c |\n|---|\n| `v1` [two](2.md) |\n"
    assert pages.typed_tables(page) == ["| a | b |"]


def test_intervals_and_pairs() -> None:
    low, high = interval("1" * 95 + "0" * 5)
    assert (low, high) == pytest.approx((88.82, 97.85), abs=0.01)  # Wilson, by hand
    assert not differ("1110", "0111")
    assert differ("1" * 20 + "0" * 5, "0" * 20 + "0" * 5)
    assert lost_error("1100", "1010") == pytest.approx(100 * (0.5 / 4) ** 0.5)
    with pytest.raises(ValueError, match="cannot be compared in pairs"):
        differ("11", "1")
