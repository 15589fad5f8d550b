"""The terminal: results on stdout, remarks, bars and errors on stderr; how much of them, and in which colours.

Colours are rich's: on a terminal only, never with NO_COLOR set.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from rich.theme import Theme

T = TypeVar("T")


@dataclass(frozen=True)
class TerminalOptions:
    """What is shown while a command runs."""

    quiet: bool = False
    """Show no progress and no remarks; results and errors only."""
    verbose: bool = False
    """Show how long every stage took, and where in the code an error comes from."""

    def check(self) -> None:
        """Raise ValueError if both are given."""
        if self.quiet and self.verbose:
            raise ValueError("give --quiet or --verbose, not both")


_USUAL = TerminalOptions()
_OPTIONS: ContextVar[TerminalOptions] = ContextVar("options", default=_USUAL)
_COMMAND: ContextVar[tuple[str, ...]] = ContextVar("command", default=())


@contextmanager
def terminal(options: TerminalOptions) -> Iterator[None]:
    """Show that much inside the ``with``."""
    options.check()
    token = _OPTIONS.set(options)
    try:
        yield
    except Exception:
        if options.verbose:
            _stderr().print_exception()
        raise
    finally:
        _OPTIONS.reset(token)


@contextmanager
def command_line(words: Sequence[str]) -> Iterator[None]:
    """What was typed, for the records that are written inside the ``with``."""
    token = _COMMAND.set(tuple(words))
    try:
        yield
    finally:
        _COMMAND.reset(token)


def typed_command() -> str | None:
    """The command line that is running, to paste into a shell; None if the functions were called from Python."""
    return shlex.join(_COMMAND.get()) or None


class _Verdicts(RegexHighlighter):
    """The words that a reader of a table looks for."""

    highlights = (
        r"(?P<good>\bfaster\b)",
        r"(?P<bad>\b(slower|gained nothing|not run|refused|failed)\b)",
        r"(?m)(?P<dense>^dense\b.*$)",
    )


_THEME = Theme({"good": "green", "bad": "bold yellow", "dense": "dim", "error": "bold red", "remark": "dim"})


def show(text: str) -> None:
    """A result, on stdout."""
    console = Console(theme=_THEME, highlighter=_Verdicts(), soft_wrap=True)
    console.print(text, markup=False, emoji=False)


def say(text: str) -> None:
    """A remark for the person, kept apart from the result on stdout."""
    if not _OPTIONS.get().quiet:
        _stderr().print(text, style="remark", markup=False, highlight=False, emoji=False)


def complain(prog: str, text: str) -> None:
    """An error, as one line on stderr."""
    try:
        line = Text.assemble((f"{prog}: error:", "error"), " ", text)
        _stderr().print(line, highlight=False)
    except (OSError, ImportError, MemoryError):  # nothing is left that colours could be imported with
        sys.stderr.write(f"{prog}: error: {text}\n")


def _stderr() -> Console:
    return Console(stderr=True, theme=_THEME, soft_wrap=True)


def progress(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """A bar with the time left, on stderr."""
    with timed(title), progress_bar() as bar:
        yield from bar.track(items, total=total, description=title)


def progress_bar() -> Progress:
    """The project's one look of a progress bar; invisible with --quiet, and where stderr is no terminal."""
    console = Console(stderr=True)
    hidden = _OPTIONS.get().quiet or not console.is_terminal
    return Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        # Older releases of rich end a bar that is not shown with an empty line.
        console=Console(quiet=True) if hidden else console,
        transient=True,
        disable=hidden,
    )


@contextmanager
def share_bar(title: str) -> Iterator[Callable[[float], None]]:
    """A bar for work that reports which share of it is done, 0 to 1."""
    with timed(title), progress_bar() as bar:
        task = bar.add_task(title, total=100)
        yield lambda share: bar.update(task, completed=round(100 * share))


@contextmanager
def stage_bar(stages: int) -> Iterator[Callable[[str], None]]:
    """A bar for work in a few stages, each announced by its name."""
    with timed("export"), progress_bar() as bar:
        task = bar.add_task("", total=stages, completed=-1)

        def begin(title: str) -> None:
            bar.update(task, description=title, advance=1)

        yield begin


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return _OPTIONS.get().quiet


@contextmanager
def timed(title: str) -> Iterator[None]:
    """With --verbose, say how long it took."""
    start = time.perf_counter()
    yield
    if _OPTIONS.get().verbose:
        say(f"{title}: {time.perf_counter() - start:.1f} s")
