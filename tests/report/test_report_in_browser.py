"""The page in Chromium: no errors, no network, charts that answer to the mouse, both themes, a phone's width."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import chromium
from report_records import ALL, HOSTILE, sweep_record

from cpvit.report import read_record, write_report


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = [sweep_record(HOSTILE), *(make() for kind, make in ALL.items() if kind != "sweep")]
    records = [read_record(json.dumps(values), f"{number}.json") for number, values in enumerate(made)]
    return write_report(records, tmp_path_factory.mktemp("page") / "report.html")


class Watched:
    """A page, what its console said and what it asked for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.page = browser.new_context(**options).new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("[data-drawn]")


def test_it_opens_without_errors_and_without_the_network(browser: Any, page_file: Path) -> None:
    opened = Watched(browser, page_file)
    for drawing in opened.page.locator(".chart > div").all():
        drawing.scroll_into_view_if_needed()
        opened.page.wait_for_selector(f"#{drawing.get_attribute('id')}[data-drawn]")
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [page_file.as_uri()]
    assert opened.page.locator(".chart .still").count() == 0
    assert opened.page.locator("section").count() == 7


def test_hovering_a_point_shows_its_numbers(browser: Any, page_file: Path) -> None:
    opened = Watched(browser, page_file, viewport={"width": 1280, "height": 900})
    point = opened.page.locator("#chart-1 .mark-symbol path[aria-label*='tome']").first
    point.scroll_into_view_if_needed()
    point.hover(force=True)
    tooltip = opened.page.locator("#vg-tooltip-element")
    tooltip.wait_for(state="visible")
    words = tooltip.inner_text()
    assert "tome" in words
    assert "78" in words
    assert opened.said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_the_window_in_both_themes(browser: Any, page_file: Path, scheme: str, width: int) -> None:
    opened = Watched(browser, page_file, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.page.locator("#chart-1").get_attribute("data-drawn") == scheme
    shade = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, shade[4:-1].split(","))) < 200) == (scheme == "dark")


def test_charts_follow_a_change_of_theme(browser: Any, page_file: Path) -> None:
    opened = Watched(browser, page_file, color_scheme="light")
    opened.page.emulate_media(color_scheme="dark")
    opened.page.wait_for_selector("#chart-1[data-drawn=dark]")
    assert opened.said == []


def test_without_scripts_the_charts_are_there_as_pictures(browser: Any, page_file: Path) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(page_file.as_uri())
    stills = page.locator(".chart .still")
    assert stills.count() > 5
    box = stills.first.bounding_box()
    assert box is not None
    assert box["height"] > 200
