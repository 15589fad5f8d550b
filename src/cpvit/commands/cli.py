"""The command line: a subcommand per verb, each a typed function of :mod:`cpvit.commands`; nothing else."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import re
import sys
from collections.abc import Callable, Sequence

import tyro

from cpvit.commands.terminal import TerminalOptions, command_line, complain, terminal

USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError)
"""What the library raises with a message meant for the user. Anything else is a bug and shows its traceback."""

NO_MEMORY = "out of memory: there is none left"


def commands() -> dict[str, Callable[..., None]]:
    """Subcommand to function."""
    from cpvit.commands import (
        app,
        benchmark,
        demo,
        embed,
        eval,
        export,
        finetune,
        models,
        plan,
        predict,
        report,
        support,
        sweep,
        verify,
    )

    return {
        "eval": eval.run,
        "benchmark": benchmark.run,
        "plan": plan.run,
        "finetune": finetune.run,
        "sweep": sweep.run,
        "report": report.run,
        "export": export.run,
        "predict": predict.run,
        "embed": embed.run,
        "verify": verify.run,
        "models": models.run,
        "support": support.run,
        "demo": demo.run,
        "app": app.run,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    return run_cli(commands(), sys.argv[1:] if arguments is None else arguments, prog="cpvit")


def entry_point() -> None:
    """What the ``cpvit`` script calls."""
    sys.exit(main())


def run_cli(
    functions: dict[str, Callable[..., None]] | Callable[..., None], arguments: Sequence[str], *, prog: str
) -> int:
    """Parse, call, and turn a user's mistake into one line on stderr.

    Returns:
        0 if it did what was asked, 1 for an error, 2 for a command line that cannot be understood, 130 if
        interrupted.
    """
    try:
        with command_line((prog, *arguments)):
            parse(functions, arguments, prog)()
        return 0
    except SystemExit as stop:  # --help, or a command line tyro refused
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except MemoryError as error:
        complaint = f"out of memory: {error}" if str(error) else NO_MEMORY
    except ImportError as error:
        complaint = f"a package cannot be loaded: {error}"
    except USER_ERRORS as error:
        complaint = _reason(error)
    # Said only here: an error holds all that the command had made, and saying it may need that memory.
    complain(prog, _one_line(complaint))
    return 1


def _reason(error: Exception) -> str:
    try:
        text = str(error) or type(error).__name__
    except MemoryError:  # some errors of torch put their words together only now
        return NO_MEMORY
    if text == "could not create a primitive":  # all that oneDNN says where it gets no memory
        return f"out of memory, most likely: oneDNN {text}"
    return text


def parse(
    functions: dict[str, Callable[..., None]] | Callable[..., None], arguments: Sequence[str], prog: str
) -> Callable[[], None]:
    """Let tyro parse, without calling yet; its boxed complaint becomes one line.

    Raises:
        SystemExit: Help was asked for, or the command line cannot be understood.
    """
    complaint = io.StringIO()
    config = (tyro.conf.OmitArgPrefixes,)
    given = list(arguments)
    try:
        with contextlib.redirect_stderr(complaint):
            if callable(functions):
                call = tyro.cli(_deferred(functions), args=given, prog=prog, config=config)
            else:
                later = {name: _deferred(function) for name, function in functions.items()}
                call = tyro.extras.subcommand_cli_from_dict(later, args=given, prog=prog, config=config)
    except SystemExit as stop:
        if stop.code == 2:
            complain(prog, unboxed(complaint.getvalue()))
        raise
    return call


def _deferred(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The command line of the function, and --quiet and --verbose; parsing it gives a call to make."""
    signature = inspect.signature(function, eval_str=True)
    shown = inspect.Parameter(
        "terminal_options",
        inspect.Parameter.KEYWORD_ONLY,
        default=TerminalOptions(),
        annotation=TerminalOptions,
    )

    @functools.wraps(function)
    def bind(*args: object, terminal_options: TerminalOptions, **kwargs: object) -> Callable[[], None]:
        def call() -> None:
            with terminal(terminal_options):
                function(*args, **kwargs)

        return call

    parameters = [*signature.parameters.values(), shown]
    bind.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    bind.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": Callable[[], None]}
    return bind


def unboxed(text: str) -> str:
    """The words in one of tyro's boxes, as one line, without title, borders and the reminder of --help."""
    rows = [re.sub(r"[╭╮╰╯│─]+", " ", row).strip() for row in text.splitlines()[1:]]
    words = _one_line(re.split(r"Argument helptext:|For full helptext", " ".join(rows))[0])
    return re.sub(r"Error parsing __tyro-dummy-inner__\S*: ", "", words)


def _one_line(text: str) -> str:
    return " ".join(text.split())
