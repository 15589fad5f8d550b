"""``cpvit app``: a page on this machine that shows what pruning does to an image."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from cpvit.app.curve import read_panel
from cpvit.app.handlers import Handlers
from cpvit.app.serve import ServeOptions, free_port, serve
from cpvit.app.subject import Subject, class_labels, demo_subject
from cpvit.commands.common import build_preprocessing, class_names, open_model, say
from cpvit.commands.options import ModelOptions, PreprocessingOptions
from cpvit.export.runtimes import ExportedModel, open_exported
from cpvit.plans.escalation import Escalation, load_plan
from cpvit.plans.plan import Plan
from cpvit.pruning.opening import unprune_host
from cpvit.pruning.prune import plan_of

LOCAL = ServeOptions()


@dataclass(frozen=True)
class AppModelOptions(ModelOptions):
    """Which model, with which weights, and where it runs."""

    model: str = ""
    """As for every command; without it the digit model that comes with the package."""


@dataclass(frozen=True)
class AppFiles:
    """What else is shown."""

    plan: Path | None = None
    """A plan written by ``cpvit plan``: one more choice next to the methods."""
    exported: Path | None = None
    """A file written by ``cpvit export``: one more choice, which runs in its own runtime. With --model that model is
    shown beside it, and what happens inside; without, the file alone."""
    sweep: Path | None = None
    """A record written by ``cpvit sweep --json``: its curve has a tab of its own."""


def run(
    model: AppModelOptions,
    preprocessing: PreprocessingOptions,
    files: AppFiles,
    serving: ServeOptions = LOCAL,
) -> None:
    """Show, in a browser, what a pruned model does to an image; Ctrl-C ends it.

    The page is on this machine and asks nothing of any other; images that are dropped on it are gone when it stops.
    """
    check_gradio()
    free_port(serving)
    curve = None if files.sweep is None else read_panel(files.sweep)
    handlers = Handlers(_subject(model, preprocessing, files), curve)

    def started(address: str) -> None:
        print(f"cpvit app: {address} (Ctrl-C ends it)", flush=True)
        if serving.host not in ("127.0.0.1", "localhost", "::1"):
            say(
                f"--host {serving.host}: everybody who reaches this machine sees the page; there is no password"
            )

    serve(handlers, serving, started)
    print("cpvit app: stopped", file=sys.stderr)


def check_gradio() -> None:
    """Raise unless the page can be made.

    Raises:
        ValueError: Gradio is not installed; the message has the command.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("gradio is needed for cpvit app and is not installed: pip install 'cpvit[app]'")


def _subject(model: AppModelOptions, preprocessing: PreprocessingOptions, files: AppFiles) -> Subject:
    plan = _plan(files.plan)
    exported = None if files.exported is None else open_exported(files.exported)
    if model.model:
        return _of_model(model, preprocessing, plan, exported)
    if model != AppModelOptions() or preprocessing != PreprocessingOptions():
        raise ValueError("give --model NAME as well; the packaged model takes no other options")
    if exported is None:
        return demo_subject(plan)
    if plan is not None:
        raise ValueError("--plan needs a model that it is for: give --model and --checkpoint")
    return _of_file(exported)


def _of_model(
    model: AppModelOptions,
    preprocessing: PreprocessingOptions,
    plan: Plan | None,
    exported: ExportedModel | None,
) -> Subject:
    host = open_model(model)
    saved = plan_of(host.model)
    if saved is not None:
        if plan is not None:
            raise ValueError(f"{model.model} holds a pruned model and its plan; leave out --plan")
        plan = saved
        unprune_host(host)
    names = class_labels(host.num_classes, class_names(host.model))
    return Subject(host, build_preprocessing(host.model, preprocessing), names, plan, exported)


def _of_file(exported: ExportedModel) -> Subject:
    described = exported.description
    if described.preprocessing is None:
        raise ValueError(
            f"{exported.path} does not say how images are prepared; export it anew with --mean and --std"
        )
    names = class_labels(described.num_outputs, described.classes)
    return Subject(None, described.preprocessing, names, exported=exported)


def _plan(path: Path | None) -> Plan | None:
    if path is None:
        return None
    plan = load_plan(path)
    if isinstance(plan, Escalation):
        raise ValueError(f"{path} holds two plans to escalate between, and the page shows one; give a plan")
    if plan.head_correction:
        raise ValueError(
            f"{path} corrects projections on calibration images, which the page does not have; make a plan without "
            "head correction, or save the pruned model and give its folder by --model"
        )
    return plan
