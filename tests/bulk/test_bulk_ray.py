"""The actors of a Ray cluster write what one process does, also when one of them, or its node, goes."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from bulk_runs import asked, contents, parts, ran, write_folder, write_weights

from cpvit.bulk.listing import list_source
from cpvit.commands.bulk import build_job, run_bulk
from cpvit.commands.bulk_options import BulkImages, BulkInstead, BulkModelOptions, BulkRequest
from cpvit.commands.cli import main
from cpvit.commands.embed import EmbedOutput
from cpvit.commands.options import CalibrationOptions, PreprocessingOptions
from cpvit.plans.config import PruneConfig

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
        patch.setenv("RAY_worker_niceness", "0")  # else whatever runs beside the tests starves the actors
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


def makers() -> list[int]:
    """Processes of the actors that make parts."""
    found = psutil.process_iter(["cmdline"])
    return [
        one.pid
        for one in found
        if (one.info["cmdline"] or [""])[0].startswith("ray::MapWorker(MapBatches(PartM")
    ]


def test_a_cluster_of_two_nodes_that_loses_an_actor_and_a_node(
    cluster: Any, weights: Path, images: Path, tmp_path: Path, one: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    lost: list[str] = []

    def lose() -> None:
        """An actor once the first part is there, and a node once there are five."""
        wait_for(lambda: len(parts(out)) > 0)
        os.kill(makers()[0], signal.SIGKILL)
        lost.append("an actor")
        wait_for(lambda: len(parts(out)) > 4)
        cluster.remove_node(cluster.list_all_nodes()[1])
        lost.append("a node")

    thread = threading.Thread(target=lose)
    thread.start()
    assert main(line(weights, images, out)) == 0
    thread.join()
    assert lost == ["an actor", "a node"]
    assert contents(out) == one
    assert not list(out.glob(".part*"))
    assert main([*line(weights, images, out), "--resume"]) == 0


def wait_for(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while time.monotonic() < end and not happens():
        time.sleep(0.005)


def test_an_actor_does_not_go_on_with_another_run(weights: Path, images: Path, tmp_path: Path) -> None:
    """What an actor finds on its machine is compared with what the run was begun with."""
    out = tmp_path / "out"
    output = EmbedOutput(out=out, rows_per_part=4)
    model = BulkModelOptions("test_vit", checkpoint=weights, image_size=(64,), device="cpu")
    dense = BulkInstead(dense=True)
    request = BulkRequest(
        model,
        BulkImages(str(images), batch_size=4),
        PruneConfig(),
        dense,
        CalibrationOptions(),
        PreprocessingOptions(),
        output,
        features="pooled",
    )
    run_bulk(request, None)
    list_source(str(images), out / "_index.arrow")
    assert len(build_job(request).parts) == COUNT // 4
    with pytest.raises(ValueError, match=r"was begun differently .* features was 'pooled' and is 'class'"):
        build_job(dataclasses.replace(request, features="class"))
