"""The actors of a Ray cluster write what one process does, also when one of them, or its node, goes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bulk_runs import asked, contents, parts, ran, write_folder, write_weights

from cpvit.commands.cli import main

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

# Ray warns about itself, and leaves sockets to the garbage collector.
pytestmark = [pytest.mark.filterwarnings("ignore")]
COUNT = 60
MERGED = ["--method", "cpvit-merge", "--macs", "0.7", "--rows-per-part", "4"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "folder", COUNT, bad=True)


@pytest.fixture(scope="module")
def one(weights: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    ran("embed", weights, images, out, *MERGED)
    return contents(out)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of one processor each, on this machine. Their workers find the package where this process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        made = cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8}
        )
        made.add_node(num_cpus=1, object_store_memory=10**8)
        ray.init(address=made.address, logging_level="error", log_to_driver=False)
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def line(weights: Path, images: Path, out: Path) -> list[str]:
    return asked("embed", weights, images, out, *MERGED, "--engine", "ray", "--actors", "2")


def test_a_cluster_of_two_nodes_and_the_death_of_an_actor(
    cluster: Any, weights: Path, images: Path, tmp_path: Path, one: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    killed: list[int] = []

    def kill_one() -> None:
        """Once the first part is there, the first actor dies."""
        end = time.monotonic() + 120
        while time.monotonic() < end and not (out.exists() and parts(out)):
            time.sleep(0.01)
        for actor in ray.util.state.list_actors(filters=[("state", "=", "ALIVE")]):
            if "MapWorker" in actor.class_name and not killed:
                os.kill(actor.pid, signal.SIGKILL)
                killed.append(actor.pid)

    thread = threading.Thread(target=kill_one)
    thread.start()
    assert main(line(weights, images, out)) == 0
    thread.join()
    assert killed
    assert contents(out) == one
    assert not list(out.glob(".part*"))
