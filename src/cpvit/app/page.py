"""The page, in Gradio: components and which handler answers which of them. Everything else is in the other files."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData
from torch import Tensor

from cpvit.app import fragments
from cpvit.app.curve import chart
from cpvit.app.handlers import Handlers, Loaded
from cpvit.app.look import Look
from cpvit.methods import METHODS
from cpvit.report.accuracy import Panel

FIRST_BUDGET = 60
COMPARED = ("cpvit-merge", "tome", "pitome", "cpvit")
QUIET: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
"""Nothing of the page is an API; several people are served at once, and turns are taken where they must be."""
IN_ORDER: dict[str, Any] = {
    "api_visibility": "private",
    "concurrency_limit": 1,
    "concurrency_id": "answers",
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}
"""Answers come in the order of the questions. An event for each control: of one event for all, Gradio forgets what
changes while it is under way."""
TIMINGS: dict[str, Any] = {**QUIET, "concurrency_limit": 1, "concurrency_id": "timings"}
"""Timings too: of two at once the older could end last, and what it says would stay."""

SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONOSPACE_FONTS = ("ui-monospace", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Gradio's default with the fonts that are on the machine: its own would be fetched."""
    return gr.themes.Default(
        primary_hue="blue",
        font=[gr.themes.Font(name) for name in SYSTEM_FONTS],
        font_mono=[gr.themes.Font(name) for name in MONOSPACE_FONTS],
    )


def build(handlers: Handlers) -> gr.Blocks:
    """The page of a model."""
    with gr.Blocks(title="cpvit app", analytics_enabled=False, fill_width=False) as page:
        _html("head", fragments.heading(handlers.subject.name, handlers.subject.digits))
        image, seen = gr.State(None), gr.State("one")
        with gr.Row():
            inputs = _image_inputs(handlers)
        note = _html("note")
        with gr.Tabs():
            with gr.Tab("Look inside", id="one") as one:
                _one_method(handlers, image)
            with gr.Tab("Compare", id="compare") as compare:
                _compare_methods(handlers, image, seen, compare)
            with gr.Tab("Accuracy", id="curve") as cost:
                _curve(handlers)
        one.select(lambda: "one", None, seen, **QUIET)
        cost.select(lambda: "curve", None, seen, **QUIET)
        _wire_images(handlers, page, inputs, image, note)
    return page


def _html(name: str, value: str = "") -> gr.HTML:
    return gr.HTML(value, elem_id=f"cp-{name}", js_on_load=None, apply_default_css=False)


def _image_inputs(handlers: Handlers) -> tuple[gr.File, gr.Gallery]:
    file = gr.File(
        label="Image",
        file_types=[".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"],
        elem_id="cp-file",
        height=160,
        scale=1,
        min_width=260,
    )
    gallery = gr.Gallery(
        [(example.picture, example.title) for example in handlers.examples],
        label="Examples: handwritten digits",
        columns=len(handlers.examples),
        rows=None,
        height=160,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="cp-examples",
        format="png",
        scale=2,
        min_width=260,
    )
    return file, gallery


def _wire_images(
    handlers: Handlers, page: gr.Blocks, inputs: tuple[gr.File, gr.Gallery], image: gr.State, note: gr.HTML
) -> None:
    file, gallery = inputs

    def choose(event: gr.SelectData) -> tuple[Tensor | None, str, None]:
        return (*handlers.load_example(event.index), None)

    def first() -> Loaded:
        return handlers.load_example(0)

    gr.on([file.upload, file.clear], handlers.load_file, file, [image, note], **QUIET)
    gallery.select(choose, None, [image, note, file], **QUIET)
    page.load(first, None, [image, note], **QUIET)


def _block_controls(depth: int, name: str) -> tuple[gr.Slider, gr.Radio]:
    """A slider over the blocks with two buttons, and how pictures are drawn; without blocks nothing is seen."""
    with gr.Group(visible=depth > 0):
        block = gr.Slider(
            1,
            max(2, depth),
            value=max(1, round(2 * depth / 3)),
            step=1,
            label="Block",
            elem_id=f"cp-{name}-block",
            buttons=[],
        )
        mode = gr.Radio(
            [("mean colours", "mean"), ("outlines", "outline"), ("both", "both")],
            value="both",
            label="Merged patches are drawn with",
            elem_id=f"cp-{name}-mode",
        )
    with gr.Row(visible=depth > 0):
        before = gr.Button("Previous block", size="md", min_width=100, elem_id=f"cp-{name}-previous")
        after = gr.Button("Next block", size="md", min_width=100, elem_id=f"cp-{name}-next")
    before.click(None, block, block, js="block => Math.max(1, block - 1)")
    after.click(None, block, block, js=f"block => Math.min({max(1, depth)}, block + 1)")
    return block, mode


def _budget(name: str) -> gr.Slider:
    return gr.Slider(
        30,
        100,
        value=FIRST_BUDGET,
        step=5,
        label="Budget: percent of the dense MACs",
        elem_id=f"cp-{name}-budget",
        scale=2,
        min_width=240,
        buttons=[],
    )


def _one_method(handlers: Handlers, image: gr.State) -> None:
    choices = handlers.choices
    look = gr.State(None)
    with gr.Row():
        with gr.Column(min_width=300):
            with gr.Group():
                method = gr.Dropdown(
                    list(choices), value=choices[0], label="Method", elem_id="cp-method", filterable=False
                )
                budget = _budget("one")
            answers, times, downloads = _html("answers"), _html("times"), _html("downloads")
        with gr.Column(min_width=300):
            block, mode = _block_controls(handlers.depth, "one")
            figures = _html("figures")

    def measure(shown: Look | None) -> str:
        return handlers.measure([shown])

    for changed in (image.change, method.change, budget.change):
        changed(
            handlers.answer,
            [image, look, method, budget, block, mode],
            [look, answers, figures, downloads, times],
            **IN_ORDER,
        ).then(measure, look, times, **TIMINGS)
    gr.on(
        [block.change, mode.change],
        handlers.paint,
        [look, block, mode],
        [figures, downloads],
        trigger_mode="always_last",
        **QUIET,
    )
    method.change(lambda name: gr.update(interactive=name in METHODS), method, budget, **QUIET)
    budget.interactive = choices[0] in METHODS


def _compare_methods(handlers: Handlers, image: gr.State, seen: gr.State, tab: gr.Tab) -> None:
    choices = handlers.choices
    first = [name for name in choices if name not in METHODS] + [name for name in COMPARED if name in choices]
    looks = gr.State(())
    with gr.Row():
        with gr.Column(min_width=300), gr.Group():
            methods = gr.CheckboxGroup(list(choices), value=first, label="Methods", elem_id="cp-methods")
            budget = _budget("compare")
        with gr.Column(min_width=300):
            block, mode = _block_controls(handlers.depth, "compare")
    shown, times = _html("compared"), _html("compared-times")
    inputs = [image, looks, methods, budget, block, mode]
    outputs = [looks, shown, times]

    def when_seen(name: str, *values: Any) -> Any:
        return handlers.compare(*values) if name == "compare" else ((), "", "")

    tab.select(lambda: "compare", None, seen, **QUIET).then(handlers.compare, inputs, outputs, **QUIET).then(
        handlers.measure, looks, times, **TIMINGS
    )
    for changed in (image.change, methods.change, budget.change):
        changed(when_seen, [seen, *inputs], outputs, **IN_ORDER).then(
            handlers.measure, looks, times, **TIMINGS
        )
    gr.on(
        [block.change, mode.change],
        handlers.paint_compared,
        [looks, block, mode],
        shown,
        trigger_mode="always_last",
        **QUIET,
    )


def _curve(handlers: Handlers) -> None:
    known = handlers.curve
    if known is None and not handlers.subject.digits:
        text = (
            "No sweep was given: start with cpvit app --sweep RECORD.json, which cpvit sweep --json writes."
        )
        _html("curve-table", fragments.status(text))
        return
    button = gr.Button("Compute on the demo's digits (a minute)", visible=known is None, elem_id="cp-compute")
    plot = gr.Plot(
        None if known is None else plotted(known),
        label="Top-1 against MACs",
        elem_id="cp-curve",
        visible=known is not None,
        buttons=[],
    )
    table = _html("curve-table", "" if known is None else fragments.curve_table(known))

    def compute(progress: gr.Progress = gr.Progress()) -> tuple[Any, str, Any]:  # noqa: B008
        found = handlers.digits_curve(lambda share, title: progress(share, desc=title))
        return gr.Plot(plotted(found), visible=True), fragments.curve_table(found), gr.update(visible=False)

    button.click(compute, None, [plot, table, button], api_visibility="private")


def plotted(panel: Panel) -> PlotData:
    """What Gradio draws with the Vega it brings."""
    return PlotData(type="altair", plot=json.dumps(chart(panel)))
