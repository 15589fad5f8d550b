"""Pieces of the page as HTML. Every text is escaped; pictures are in the page itself, so that no file is written."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

from cpvit.app.look import Answer, Look, Side, Times
from cpvit.app.variants import Choice
from cpvit.measure.timings import Latency
from cpvit.pictures import Mode, paint_attention, paint_block
from cpvit.pictures.patches import MIN_SIDE, to_picture
from cpvit.report.accuracy import Panel


def status(text: str) -> str:
    """A remark, read out by screen readers when they are done with what they read."""
    return f'<p class="cp-status" role="status">{escape(text)}</p>'


def alert(text: str) -> str:
    """What went wrong, read out at once."""
    return f'<p class="cp-alert" role="alert">{escape(text)}</p>'


def answers(look: Look) -> str:
    """The likeliest classes of both models, side by side."""
    sides = [side for side in (look.dense, look.pruned) if side is not None]
    verdict = ""
    if look.kl is not None:
        words = "Same answer." if look.agrees else "Another answer."
        verdict = f'<p class="cp-verdict">{words} KL divergence {look.kl:.2g} nats.</p>'
    return f'<div class="cp-sides">{"".join(map(_answers_of, sides))}</div>{verdict}'


def _answers_of(side: Side) -> str:
    rows = "".join(_answer_row(answer) for answer in side.answers)
    head = '<tr><th scope="col">class</th><th scope="col">probability</th></tr>'
    caption = f"<caption>{escape(side.title)}</caption>"
    return f'<table class="cp-table">{caption}<thead>{head}</thead><tbody>{rows}</tbody></table>'


def _answer_row(answer: Answer) -> str:
    share = 100 * answer.probability
    bar = f'<span class="cp-bar" aria-hidden="true" style="width:{share:.1f}%"></span>'
    return f'<tr><th scope="row">{escape(answer.label)}</th><td>{bar}<span>{share:.2f}%</span></td></tr>'


def numbers(look: Look) -> str:
    """MACs and patches left, as one line."""
    macs = f"{look.pruned.macs / 1e9:.3f} GMACs"
    if look.dense is None or look.macs_ratio is None:
        return f'<p class="cp-numbers">{macs} per image.</p>'
    dense = f"{look.dense.macs / 1e9:.3f}"
    return (
        f'<p class="cp-numbers"><strong>{100 * look.macs_ratio:.2f}%</strong> of the dense MACs '
        f"({macs} of {dense}).</p>"
    )


def times(found: Times) -> str:
    """Measured milliseconds and memory of all, as a table."""
    ups = ["", *(f"{up.median:.2f}x ({up.p10:.2f} to {up.p90:.2f})" for up in found.speedups)]
    rows = [
        [title, _milliseconds(latency), up, "-" if peak is None else f"{peak:.1f}"]
        for title, latency, up, peak in zip(
            found.titles, found.latencies, ups or [""], found.peaks_mib, strict=False
        )
    ]
    caption = f"Measured here, one image, {found.rounds} rounds in turn: median (10th to 90th percentile)"
    return table(caption, ["", "ms", "speed-up", "peak MiB"], rows)


def _milliseconds(latency: Latency) -> str:
    return f"{latency.median:.1f} ({latency.p10:.1f} to {latency.p90:.1f})"


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first entry of each row is its heading. It scrolls sideways where it does not fit."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(entry)}</td>" for entry in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="cp-scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table class="cp-table">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def patch_counts(look: Look, block: int) -> str:
    """How many patches leave each block, as bars; ``block`` counts from 1 and is marked."""
    if look.grid is None:
        return ""
    whole = look.grid[0] * look.grid[1]
    bars = "".join(
        f'<li{" aria-current=step" if number == block else ""}><span class="cp-column" aria-hidden="true" '
        f'style="height:{max(2.0, 100 * len(view.positions) / whole):.1f}%"></span><span class="cp-count">'
        f'<span class="cp-hidden">block {number}: </span>{len(view.positions)}</span></li>'
        for number, view in enumerate(look.pruned.blocks, start=1)
    )
    return f'<ol class="cp-columns" aria-label="Patches that leave each block, of {whole}">{bars}</ol>'


def figures(look: Look, block: int, mode: Mode) -> str:
    """The image, what leaves a block (counted from 1), and what the class token looks at there."""
    shown = [
        figure(to_picture(look.pixels, MIN_SIDE), "As the model gets it", "The image, cropped and resized")
    ]
    if look.grid is None or not look.depth:
        why = (
            "What happens inside a file cannot be seen; give the model that was exported by --model as well."
        )
        return _grid(shown, "cp-pairs") + status(why)
    text = f"After block {block}: {_left(look, block)}"
    shown.append(figure(block_picture(look, block, mode), text, f"{look.pruned.title}. {text}"))
    for side in (look.pruned, look.dense):
        if side is not None and side.blocks:
            heat = paint_attention(look.pixels, side.blocks[block - 1].attention, look.grid)
            title = f"Class attention in block {block}, {side.title}"
            shown.append(figure(heat, title, f"{title}: from low (dark blue) to high (yellow)"))
    return _grid(shown, "cp-pairs")


def _left(look: Look, block: int) -> str:
    assert look.grid is not None
    view, whole = look.pruned.blocks[block - 1], look.grid[0] * look.grid[1]
    if view.carrier is None:
        return f"{len(view.positions)} of {whole} patches left"
    return f"{whole} patches in {len(view.positions)} tokens"


def block_picture(look: Look, block: int, mode: Mode) -> Image.Image:
    """What leaves a block, counted from 1."""
    assert look.grid is not None, "a look with blocks has a grid"
    view = look.pruned.blocks[block - 1]
    return paint_block(look.pixels, view.positions, view.carrier, look.grid, mode=mode)


def compared(looks: Sequence[Look], block: int, mode: Mode) -> str:
    """Several methods on the same image: pictures and a table."""
    if not looks:
        return ""
    shown = [
        figure(
            block_picture(look, block, mode),
            f"{look.pruned.title}: {_verdict(look)}",
            f"{look.pruned.title} after block {block}: {_left(look, block)}",
        )
        for look in looks
        if look.depth
    ]
    rows = [
        [
            side.title,
            side.answers[0].label,
            f"{100 * side.answers[0].probability:.2f}",
            f"{100 * side.macs / reference:.2f}",
            "" if kl is None else f"{kl:.2g}",
        ]
        for side, kl, reference in _rows(looks)
    ]
    caption = "The likeliest class, and how far the distribution is from the dense model's"
    return _grid(shown) + table(caption, ["", "class", "probability %", "MACs %", "KL (nats)"], rows)


def _verdict(look: Look) -> str:
    best = look.pruned.answers[0]
    return f"{best.label} ({100 * best.probability:.1f}%)"


def _rows(looks: Sequence[Look]) -> Iterable[tuple[Side, float | None, int]]:
    dense = looks[0].dense
    if dense is not None:
        yield dense, None, dense.macs
    for look in looks:
        yield look.pruned, look.kl, (dense or look.pruned).macs


def downloads(look: Look, block: int, mode: Mode) -> str:
    """Links that save the picture and the plan; both are in the page already."""
    links = []
    name = f"{look.choice.title.replace(' ', '-').replace('%', '')}"
    if look.depth:
        picture = _png(block_picture(look, block, mode))
        links.append(_link(picture, f"{name}-block-{block}.png", "Save the picture (PNG)"))
    if look.pruned.plan is not None:
        text = base64.b64encode(look.pruned.plan.to_json().encode()).decode()
        links.append(
            _link(f"data:application/json;base64,{text}", f"{name}.plan.json", "Save the plan (JSON)")
        )
    return f'<p class="cp-links">{"".join(links)}</p>' if links else ""


def _link(address: str, name: str, text: str) -> str:
    return f'<a class="cp-link" download="{escape(name)}" href="{address}">{escape(text)}</a>'


def figure(picture: Image.Image, caption: str, alternative: str) -> str:
    """A picture with its caption."""
    return (
        f'<figure><img src="{_png(picture)}" alt="{escape(alternative)}" width="{picture.width}" '
        f'height="{picture.height}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=3)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _grid(shown: Iterable[str], kind: str = "") -> str:
    return f'<div class="cp-figures {kind}">{"".join(shown)}</div>'


def curve_table(panel: Panel) -> str:
    """The points of a curve as a table."""
    rows = [
        [
            point.title,
            f"{point.top1:.2f} ({point.low:.2f} to {point.high:.2f})",
            "-" if point.agreement is None else f"{point.agreement:.4f}",
            "-" if point.kl is None else f"{point.kl:.2g}",
            "yes" if point.on_front else "",
        ]
        for point in panel.points
    ]
    caption = f"{panel.model}, {panel.images} images: top-1 with the 95% interval that so many images allow"
    return table(caption, ["", "top-1 %", "agreement", "KL (nats)", "Pareto front"], rows)


def heading(name: str, digits: bool) -> str:
    """The head of the page."""
    remark = (
        "The packaged demo model: it knows handwritten digits only, and sees one in anything. "
        "<code>cpvit app --model NAME --checkpoint FILE</code> shows another."
        if digits
        else ""
    )
    return (
        f"<h1>What a pruned model does to an image</h1><p>Model: <strong>{escape(name)}</strong>. {remark} "
        "Nothing you drop here leaves this machine.</p>"
    )


def choice_of(method: str, percent: float) -> Choice:
    """What the controls say."""
    return Choice(method, round(percent) / 100)
