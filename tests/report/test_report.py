"""The page: which records it takes, what it computes from them, what it refuses, and that nothing in it can run."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_records import (
    ALL,
    HOSTILE,
    eval_record,
    finetune_record,
    old_sweep_record,
    plan,
    sweep_record,
)
from scipy.stats import binomtest

from cpvit.commands.cli import main
from cpvit.report import MAX_BYTES, ReportError, load_record, read_record, write_report
from cpvit.report.accuracy import Point, curves, panels, wilson, with_front
from cpvit.report.charts import plan_chart
from cpvit.report.images import galleries, lost
from cpvit.report.records import Record
from cpvit.report.training import MOST_STEPS, thinned

pytest.importorskip("vl_convert")
pytest.importorskip("jinja2")


def record(values: object, name: str = "a.json") -> Record:
    return read_record(json.dumps(values), name)


def page_of(tmp_path: Path, *records: object) -> str:
    return write_report([record(values) for values in records], tmp_path / "page.html").read_text()


@pytest.mark.parametrize("kind", sorted(ALL))
def test_every_kind_of_record_is_told_apart_and_makes_a_page(kind: str, tmp_path: Path) -> None:
    values = ALL[kind]()
    assert record(values).kind == kind
    page = page_of(tmp_path, values)
    assert "tiny" in page
    assert len(page) < MAX_BYTES


def test_a_page_of_everything_has_every_section(tmp_path: Path) -> None:
    page = page_of(tmp_path, *(make() for make in ALL.values()))
    for section in ("accuracy", "plan", "speed", "training", "gallery", "lost", "sources"):
        assert f'<section id="{section}">' in page
    assert "no such kernel" in page
    assert "tiny.onnx" in page


def test_records_of_before_have_no_gallery_and_no_command(tmp_path: Path) -> None:
    page = page_of(tmp_path, old_sweep_record())
    assert '<section id="gallery">' not in page
    assert '<section id="lost">' not in page
    assert "not recorded" in page


def test_records_about_the_same_images_share_a_panel_with_one_dense_model() -> None:
    other = old_sweep_record() | {"images": 50}
    found = panels([record(sweep_record()), record(eval_record()), record(other)])
    assert [(panel.images, len(panel.points)) for panel in found] == [(100, 6), (50, 5)]
    assert sum(point.method == "dense" for point in found[0].points) == 1


def test_the_front_holds_what_nothing_cheaper_matches() -> None:
    def point(macs: float, top1: float) -> Point:
        return Point("m", macs, top1, 0, 0, 0, None, None, "")

    marked = with_front([point(1, 80), point(0.6, 79), point(0.601, 78), point(0.599, 78.5), point(0.5, 79)])
    assert [one.on_front for one in marked] == [True, False, False, False, True]


def test_the_interval_is_wilsons() -> None:
    for right, images in ((80, 100), (520, 650), (10, 10), (0, 3)):
        expected = binomtest(right, images).proportion_ci(method="wilson")
        found = [bound / 100 for bound in wilson(100 * right / images, images)]
        assert found == pytest.approx([expected.low, expected.high], abs=1e-4)


def test_long_trainings_are_thinned_to_means_and_gaps_left_out() -> None:
    assert thinned([1.0, None, 3.0]) == ((1, 1.0), (3, 3.0))
    points = thinned([float(step % 2) for step in range(10 * MOST_STEPS)])
    assert len(points) == MOST_STEPS
    assert {value for _, value in points} == {0.5}
    assert points[-1][0] == 10 * MOST_STEPS


def test_the_gallery_shows_the_blocks_where_patches_leave() -> None:
    shown = list(galleries([record(sweep_record())]))
    assert [traced.title for traced in shown][:2] == [
        "cpvit-merge at 60.0% of the MACs",
        "tome at 60.0% of the MACs",
    ]
    steps = shown[0].strips[0].steps
    assert [step.caption for step in steps] == ["after block 2: 3 of 4", "after block 3: 2 of 4"]
    assert all(step.picture.startswith("data:image/webp;base64,") for step in steps)
    assert steps[0].picture != shown[-1].strips[0].steps[0].picture or shown[0].title == shown[-1].title


def test_what_was_lost_is_listed_by_image_with_all_answers() -> None:
    (found,) = lost([record(sweep_record())])
    (case,) = found.cases
    assert (case.label, case.dense, case.dense_right) == ("bee", "bee (75.0%)", True)
    assert [other.model for other in case.others] == [
        "cpvit-merge at 60.0%",
        "cpvit-merge at 50.0%",
        "tome at 60.0%",
        "cpvit at 70.0%",
    ]
    assert case.others[0].answer == "class 2 (75.0%)"
    assert found.counts[0] == ("cpvit-merge at 60.0%", 10, 100)


def test_plans_of_the_same_name_are_lines_of_their_own() -> None:
    other = plan() | {"model": "other", "patches_per_block": [4, 4, 1]}
    found = curves([record(plan()), record(plan()), record(other)])
    assert [curve.tokens for curve in found] == [(5, 5, 4, 3), (5, 5, 5, 2)]
    rows = plan_chart(found)["data"]["values"]
    assert [(row["line"], row["block"]) for row in rows] == [
        (line, block) for line in (0, 1) for block in range(4)
    ]


class Tags(html.parser.HTMLParser):
    """What a browser makes elements of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_a_record_holds_becomes_an_element(tmp_path: Path) -> None:
    record = sweep_record(HOSTILE, model=HOSTILE)
    for point in record["points"]:
        point["method"] = point["schedule"] = HOSTILE
        point["plan"]["method"] = HOSTILE
    tame, wild = (Tags(page_of(tmp_path, values)).found for values in (sweep_record(), record))
    count = [[tag for tag, _ in found if tag in ("script", "img", "svg")] for found in (tame, wild)]
    assert count[1].count("script") == count[0].count("script") == 3
    assert not [attributes for _, attributes in wild if any(name.startswith("on") for name in attributes)]
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in wild)
    text = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)" in text
    assert "49.png" not in text


def test_the_page_allows_its_own_scripts_only_and_fetches_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, sweep_record())
    policy = next(
        a["content"] for tag, a in Tags(page).found if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; script-src 'sha256-\S+' 'sha256-\S+'; style-src 'unsafe-inline'; img-src data:",
        policy,
    )


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: [1, 2], "a.json holds a list, not a record; give a file that --json of cpvit eval, sweep"),
    (lambda: {"name": "demo", "picture": 3}, r"a.json is none of the records .* \(it holds name, picture\)"),
    (dict, r"it holds nothing"),
    (lambda: sweep_record() | {"images": "many"}, "a.json: images: expected a whole number, got 'many'"),
    (
        lambda: sweep_record() | {"dense_top1": 101.0},
        "a.json: dense_top1: expected a percentage from 0 to 100, got 101.0",
    ),
    (lambda: sweep_record() | {"points": 3}, "a.json: points: expected a list, got 3"),
    (
        lambda: sweep_record() | {"points": [sweep_record()["points"][0] | {"top1": None}]},
        r"a.json: points\[0\].top1: expected a number, got None",
    ),
    (
        lambda: {name: value for name, value in eval_record().items() if name != "images"},
        "a.json: images is missing; expected a whole number",
    ),
    (lambda: plan() | {"patches_per_block": [1, "x"]}, "patches_per_block: expected a list of whole numbers"),
    (
        lambda: finetune_record() | {"history": {"loss": ["x"]}},
        "history.loss: expected a list of numbers, got",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_a_wrong_record_is_refused_with_its_place(
    make: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ReportError, match=message):
        page_of(tmp_path, make())
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": {"a/1.png": "bm90IGEganBlZw=="}}, "a picture is no JPEG in base64"),
        ({"pictures": {"a/1.png": "%%%"}}, "a picture is no JPEG in base64"),
        ({"grid": [3, 3]}, "blocks must hold 9 numbers from -1 to 8 each"),
    ],
)
def test_a_gallery_that_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = eval_record()
    values["examples"] |= change
    with pytest.raises(ReportError, match=message):
        page_of(tmp_path, values)


def test_pictures_that_would_not_fit_are_left_out_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpvit.report.page.GALLERY_BYTES", 4000)
    page = page_of(tmp_path, sweep_record())
    assert 0 < page.count('<div class="strip"') < 4
    assert "Not every pruned model is shown here" in page


def test_a_page_too_large_to_mail_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpvit.report.page.MAX_BYTES", 100_000)
    (tmp_path / "page.html").write_text("the old one")
    with pytest.raises(ReportError, match=r"the page would have .* MB, more than 0.1; give fewer records"):
        page_of(tmp_path, sweep_record())
    assert (tmp_path / "page.html").read_text() == "the old one"


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ReportError, match=r"nowhere.json cannot be read: No such file"):
        load_record(tmp_path / "nowhere.json")
    with pytest.raises(ReportError, match=r"picture.png is no text"):
        load_record(picture)
    with pytest.raises(ReportError, match=r"x is not JSON .*; give a file"):
        read_record("{", "x")
    with pytest.raises(ReportError, match="no record to report on"):
        write_report([], tmp_path / "page.html")


def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(ReportError, match=r"vl_convert is needed .*: pip install 'cpvit\[report\]'"):
        page_of(tmp_path, plan())
    asked = ["benchmark", "--model", "test_vit", "--report", str(tmp_path / "page.html")]
    assert main(asked) == 1, "before anything is measured"
    assert "pip install 'cpvit[report]'" in capsys.readouterr().err


def test_the_command_writes_the_page_and_names_a_wrong_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, out = tmp_path / "sweep.json", tmp_path / "bad.json", tmp_path / "new.html"
    good.write_text(json.dumps(sweep_record()))
    bad.write_text('{"a": 1}')
    assert main(["report", str(good), "--out", str(out)]) == 0
    assert out.stat().st_size > 500_000
    out.unlink()
    assert main(["report", str(good), str(bad), "--out", str(out)]) == 1
    assert f"{bad} is none of the records that a report is made of" in capsys.readouterr().err
    assert not out.exists()
