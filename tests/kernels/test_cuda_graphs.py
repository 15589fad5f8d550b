"""CUDA graphs: what is refused can be tested anywhere, what is replayed on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_images, tiny_vit

from cpvit import PruneConfig, prune_
from cpvit.commands.cli import main
from cpvit.kernels.cuda_graphs import CapturedModel, check_same
from cpvit.measure.benchmark import BenchmarkOptions, compare
from cpvit.methods import METHODS


def test_without_cuda_it_says_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA device and torch sees none; call the model itself"):
        CapturedModel(tiny_vit(), random_images())


def test_a_model_that_trains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"the model is in training mode; call model.eval\(\) first"):
        CapturedModel(tiny_vit().train(), random_images())


def test_a_model_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match=r"needs the model on a CUDA device, got cpu; move it with .to\('cuda'\)"
    ):
        CapturedModel(tiny_vit(), random_images())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(3, 3, 8, 8),
            r"images of shape \(2, 3, 8, 8\) and got \(3, 3, 8, 8\); a CUDA graph is fixed",
        ),
        (torch.zeros(2, 3, 8, 8).half(), r"dtype torch.float32 and got torch.float16"),
        (torch.zeros(2, 3, 8, 8, device="meta"), r"device cpu and got meta"),
    ],
)
def test_other_images_than_those_captured_are_refused(images: torch.Tensor, message: str) -> None:
    check_same(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8))
    with pytest.raises(ValueError, match=message):
        check_same(torch.zeros(2, 3, 8, 8), images)


BENCHMARK = ["benchmark", "--model", "test_vit", "--cuda-graphs", "--device", "cpu", "--seconds", "0"]


@pytest.mark.parametrize("several", [[], ["--methods", "cpvit,tome"]])
def test_a_benchmark_without_cuda_is_refused_before_anything_is_timed(
    several: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for timer in ("cpvit.measure.benchmark.interleave", "cpvit.machine.timing_cache.TimingCache.measure"):
        monkeypatch.setattr(timer, lambda *_: pytest.fail("timed"))
    assert main([*BENCHMARK, *several]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("cpvit: error: ")
    assert "CapturedModel needs a CUDA device and torch sees none; call the model itself" in line


class Stub:
    """Stands in for a captured model, and knows what it was made for."""

    def __init__(self, made: list[Any], model: Any, images: Any) -> None:
        made.append(self)
        self.model, self.images, self.calls = model, images, 0

    def __call__(self, images: Any) -> Any:
        assert images is self.images
        self.calls += 1
        return self.model(images)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_benchmark_times_every_model_as_a_graph_if_asked_to(
    cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr("cpvit.measure.benchmark.check_devices", lambda *_: None)
    monkeypatch.setattr("cpvit.measure.benchmark.CapturedModel", lambda *given: Stub(made, *given))
    model = tiny_vit().float()
    configs = {name: PruneConfig(method=name, keep_rate=0.4) for name in ("cpvit", "tome")}
    result = compare(model, configs, BenchmarkOptions(batch_size=2, seconds=0, cuda_graphs=cuda_graphs))
    assert len(made) == (3 if cuda_graphs else 0)
    if cuda_graphs:
        assert made[0].model is model
        assert len({id(stub.model) for stub in made}) == 3, "the dense model and both pruned ones"
        assert [stub.calls for stub in made] == [result.rounds + 2] * 3, "two rounds are warm-up"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_replay_gives_what_the_model_gives(name: str) -> None:
    model = tiny_vit().cuda()
    prune_(model, PruneConfig(method=name, keep_rate=0.4))
    captured = CapturedModel(model, random_images(2).cuda())
    for seed in (1, 2, 3):
        images = random_images(2, seed=seed).cuda()
        with torch.inference_mode():
            torch.testing.assert_close(captured(images), model(images))
    with pytest.raises(ValueError, match="captured for images of shape"):
        captured(random_images(3).cuda())
