"""Serve the page on this machine: one address, a temporary folder of its own, nothing that calls home."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from types import FrameType

from cpvit.app.handlers import Handlers
from cpvit.app.uploads import MOST_BYTES

MOST_SESSIONS = 100
"""Pages whose images are kept at once; the oldest is forgotten."""


@dataclass(frozen=True)
class ServeOptions:
    """Where the page is."""

    host: str = "127.0.0.1"
    """Address to bind to. The default is seen from this machine only; 0.0.0.0 is seen by everybody in the network,
    and there is no password."""
    port: int = 7860
    """Port to bind to; 0 takes a free one."""


def free_port(options: ServeOptions) -> int:
    """The port to bind to.

    Raises:
        ValueError: It is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"cannot serve on {options.host}:{options.port} ({error}); give another --port, 0 for any free one, "
                "or another --host"
            ) from None
        return int(probe.getsockname()[1])


@contextmanager
def served(handlers: Handlers, options: ServeOptions) -> Iterator[str]:
    """The page is up inside the ``with``; gives its address.

    Uploads are in a temporary folder that is gone afterwards.

    Raises:
        ValueError: The port is taken.
    """
    port = free_port(options)
    with tempfile.TemporaryDirectory(prefix="cpvit-app-") as folder, _environment(folder):
        # After the variables are set, which gradio reads once.
        from cpvit.app.page import build, theme

        page = build(handlers)
        _, address, _ = page.launch(
            server_name=options.host,
            server_port=port,
            prevent_thread_lock=True,
            share=False,
            inbrowser=False,
            quiet=True,
            show_error=False,
            max_file_size=MOST_BYTES,
            allowed_paths=[],
            state_session_capacity=MOST_SESSIONS,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            theme=theme(),
            css=(resources.files("cpvit.app") / "style.css").read_text(),
        )
        try:
            yield address
        finally:
            page.close(verbose=False)


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """Gradio and what it uses read these: no telemetry, no look for newer releases, files in the folder."""
    wanted = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_DISABLE_TELEMETRY": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def serve(handlers: Handlers, options: ServeOptions, on_address: Callable[[str], None]) -> None:
    """Serve until Ctrl-C, or until the process is asked to end."""
    stop = threading.Event()

    def asked(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with served(handlers, options) as address:
            on_address(address)
            stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
