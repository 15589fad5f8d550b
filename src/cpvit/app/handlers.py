"""What the page does when somebody moves something: values in, values and HTML out; knows no Gradio.

Every function gets what one person's page holds and gives back what it shall hold; nothing of it is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cpvit.app import fragments
from cpvit.app.curve import digits_panel
from cpvit.app.examples import Example, examples
from cpvit.app.look import Look, Looking
from cpvit.app.subject import Subject
from cpvit.app.turns import Turns
from cpvit.app.uploads import UploadError, Uploads
from cpvit.app.variants import Variants
from cpvit.pictures import Mode
from cpvit.report.accuracy import Panel

MEASURING = fragments.status("Measuring ...")


class Loaded(NamedTuple):
    """An image, and what to say about it."""

    image: Tensor | None
    """[1 3 H W]; None if there is none."""
    note: str


class Painted(NamedTuple):
    """What depends on the block."""

    figures: str
    downloads: str


class Answered(NamedTuple):
    """What depends on image, method and budget."""

    look: Look | None
    answers: str
    """Or what went wrong."""
    figures: str
    downloads: str
    times: str


class Compared(NamedTuple):
    """Several methods."""

    looks: tuple[Look, ...]
    html: str
    times: str


NOTHING = Answered(None, "", "", "", "")


class Handlers:
    """Of one page, for all people that look at it."""

    def __init__(self, subject: Subject, curve: Panel | None = None) -> None:
        self.subject = subject
        self.turns = Turns()
        self.looking = Looking(Variants(subject), self.turns)
        self.uploads = Uploads(subject.preprocessing)
        self.examples: tuple[Example, ...] = examples()
        self.curve = curve
        """None until there is one; that of the digits is the same for everybody."""

    @property
    def depth(self) -> int:
        """Blocks to step through; 0 if they cannot be seen."""
        return 0 if self.subject.dense is None else self.subject.dense.depth

    @property
    def choices(self) -> tuple[str, ...]:
        """Methods to choose from."""
        return self.looking.variants.choices

    def load_file(self, path: str | None) -> Loaded:
        """The image of an uploaded file."""
        if path is None:
            return Loaded(None, fragments.status("Drop an image, or take one of the examples."))
        try:
            image = self.uploads.read(Path(path))
        except UploadError as error:
            return Loaded(None, fragments.alert(str(error)))
        return Loaded(image, fragments.status(f"Shown: {Path(path).name}"))

    def load_example(self, number: int) -> Loaded:
        """The image of an example."""
        example = self.examples[number]
        return Loaded(
            self.uploads.prepare(example.picture), fragments.status(f"Shown: example, {example.title}")
        )

    def answer(
        self, image: Tensor | None, before: Look | None, method: str, percent: float, block: float, mode: Mode
    ) -> Answered:
        """Look at the image under a method and a budget in percent of the dense MACs."""
        if image is None:
            return NOTHING
        choice = fragments.choice_of(method, percent)
        try:
            (look,) = self.looking.look(image, [choice], before)
        except ValueError as error:
            return NOTHING._replace(answers=fragments.alert(str(error)))
        html = fragments.numbers(look) + fragments.answers(look)
        return Answered(look, html, *self.paint(look, block, mode), times=MEASURING)

    def paint(self, look: Look | None, block: float, mode: Mode) -> Painted:
        """One block of a look, counted from 1."""
        if look is None:
            return Painted("", "")
        number = min(max(1, round(block)), max(1, look.depth))
        return Painted(
            fragments.patch_counts(look, number) + fragments.figures(look, number, mode),
            fragments.downloads(look, number, mode),
        )

    def measure(self, looks: Sequence[Look | None]) -> str:
        """Time what is shown, in turn."""
        shown = [look for look in looks if look is not None]
        if not shown:
            return ""
        try:
            found = self.looking.time(shown[0].image, [look.choice for look in shown])
        except (ValueError, TimeoutError) as error:
            return fragments.alert(str(error))
        return fragments.times(found)

    def compare(
        self,
        image: Tensor | None,
        before: Sequence[Look],
        methods: Sequence[str],
        percent: float,
        block: float,
        mode: Mode,
    ) -> Compared:
        """Look at the image under several methods at one budget."""
        if image is None or not methods:
            return Compared((), fragments.status("Choose an image and at least one method."), "")
        choices = [fragments.choice_of(method, percent) for method in methods]
        try:
            looks = self.looking.look(image, choices, before[0] if before else None)
        except ValueError as error:
            return Compared((), fragments.alert(str(error)), "")
        return Compared(tuple(looks), self.paint_compared(looks, block, mode), MEASURING)

    def paint_compared(self, looks: Sequence[Look], block: float, mode: Mode) -> str:
        """One block of several looks."""
        return fragments.compared(looks, max(1, round(block)), mode)

    def digits_curve(self, on_progress: Callable[[float, str], None]) -> Panel:
        """The curve of the packaged model; computed once for everybody."""
        if self.curve is None:
            assert self.subject.digits, "asked for with the packaged model only"
            assert self.subject.dense is not None, "the packaged model is one"
            self.curve = digits_panel(self.subject.dense, self.subject.preprocessing, self.turns, on_progress)
        return self.curve
