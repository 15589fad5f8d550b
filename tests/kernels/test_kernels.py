"""The Triton kernel, run by Triton's interpreter on the CPU: output and column maxima against the whole matrix."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_images, tiny_vit
from test_attention import matrix
from torch import Tensor

from cpvit import PruneConfig, plan_of, prune_
from cpvit.attention import Attended, AttentionInputs, attend
from cpvit.kernels import kernel_named

CPU = torch.device("cpu")
HERE = Path(__file__).parent

CASES = [
    # tokens, head dimension, bias
    (1, 16, "none"),
    (37, 16, "none"),
    (64, 32, "sizes"),
    (65, 24, "sizes"),
    (130, 72, "full"),
    (70, 128, "shared"),
]


def draw(
    tokens: int, head_dim: int, bias: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> AttentionInputs:
    """Query, key and value as a host gives them: strided views of one projection."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(2, tokens, 3, 3, head_dim, generator=generator).to(device, dtype)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    shapes = {"sizes": (2, 1, 1, tokens), "full": (2, 3, tokens, tokens), "shared": (1, 3, tokens, tokens)}
    added = torch.randn(shapes[bias], generator=generator).to(device, dtype) if bias in shapes else None
    return AttentionInputs(query, key, value, head_dim**-0.5, added)


def check_kernel(column_maxima: Any, dtype: torch.dtype, device: str) -> None:
    """Every case, as close to float64 as the type allows."""
    atol = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for tokens, head_dim, bias in CASES:
        given = draw(tokens, head_dim, bias, dtype, device)
        out, maxima = column_maxima(given.query, given.key, given.value, given.bias, given.scale)
        exact = AttentionInputs(*(each.double() if isinstance(each, Tensor) else each for each in given))
        probs = matrix(exact)
        assert (out.dtype, maxima.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(out.double(), probs @ exact.value, rtol=0, atol=atol)
        torch.testing.assert_close(maxima.double(), probs.amax(2), rtol=0, atol=2e-6)
        assert out.transpose(1, 2).is_contiguous()


_INTERPRETED = """
import sys; sys.path[:0] = {folders!r}
import torch
from test_kernels import check_kernel
from cpvit.kernels.triton_attention import column_maxima
check_kernel(column_maxima, torch.{dtype}, "cpu")
"""


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # the interpreter has no bfloat16
def test_interpreted_it_gives_what_the_whole_matrix_gives(dtype: str) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this system")
    code = _INTERPRETED.format(folders=[str(HERE), str(HERE.parent)], dtype=dtype)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_gives_what_the_whole_matrix_gives(dtype: torch.dtype) -> None:
    from cpvit.kernels.triton_attention import column_maxima

    check_kernel(column_maxima, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_model_gives_what_it_gives_without_the_kernel() -> None:
    model, images = tiny_vit().float().cuda(), random_images(dtype=torch.float32).cuda()
    with torch.inference_mode():
        prune_(model, PruneConfig(keep_rate=0.4))
        expected = model(images)
        prune_(model, PruneConfig(keep_rate=0.4), attention_kernel="triton")
        torch.testing.assert_close(model(images), expected)


def test_a_kernel_gives_the_column_maxima_and_nothing_else() -> None:
    given, calls = draw(9, 16, "sizes"), []

    def kernel(inputs: AttentionInputs) -> Attended:
        calls.append(inputs)
        return attend(inputs, evidence="max")

    expected = attend(given, evidence="max")
    torch.testing.assert_close(attend(given, evidence="max", kernel=kernel), expected)
    assert len(calls) == 1
    attend(given, kernel=kernel)
    attend(given, evidence="class", kernel=kernel)
    attend(given, evidence="max", return_probs=True, kernel=kernel)
    assert len(calls) == 1


def test_eager_is_torchs_own() -> None:
    assert kernel_named("eager", CPU) is None


def test_an_unknown_kernel_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="attention_kernel must be one of eager, triton, got 'flash'"):
        kernel_named("flash", CPU)


def test_triton_is_refused_on_a_cpu_and_the_model_stays_as_it_was() -> None:
    model = tiny_vit()
    plan = prune_(model, PruneConfig(keep_rate=0.4))
    with pytest.raises(ValueError, match=r"needs a CUDA device and the model is on cpu; move it first"):
        prune_(model, PruneConfig(keep_rate=0.9), attention_kernel="triton")
    assert plan_of(model) == plan


def test_triton_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpvit.kernels.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="needs the triton package, which is not installed; pip install triton"
    ):
        kernel_named("triton", torch.device("cuda"))


def test_a_method_without_column_maxima_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cpvit.pruning.prune.kernel_named", lambda name, device: lambda inputs: attend(inputs)
    )
    with pytest.raises(ValueError, match="method 'tome' is not scored by column maxima"):
        prune_(tiny_vit(), PruneConfig(method="tome", keep_rate=0.4), attention_kernel="triton")


def test_the_chosen_kernel_scores_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(inputs: AttentionInputs) -> Attended:
        calls.append(inputs)
        return attend(inputs, evidence="max")

    monkeypatch.setattr("cpvit.pruning.prune.kernel_named", lambda name, device: kernel)
    model, images = tiny_vit(), random_images()
    prune_(model, PruneConfig(keep_rate=0.4))
    calls.clear()
    expected = model(images)
    assert len(calls) == 3
    torch.testing.assert_close(expected, model(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 1, 3, 160)}, "takes a head dimension up to 128, got 160"),
        (
            {"query": torch.zeros(1, 1, 3, 16).double()},
            "takes float32, bfloat16 and float16, got torch.float64",
        ),
        ({"dropout": 0.1}, "has no attention dropout; call model.eval"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(change: dict[str, Any], message: str) -> None:
    kernels = pytest.importorskip("cpvit.kernels.triton_attention", exc_type=ImportError)
    with pytest.raises(ValueError, match=message):
        kernels.check(draw(3, 16, "none")._replace(**change))


def test_the_kernel_refuses_tensors_that_moved_off_the_gpu() -> None:
    kernels = pytest.importorskip("cpvit.kernels.triton_attention", exc_type=ImportError)
    with pytest.raises(RuntimeError, match=r"got tensors on cpu; move the model to a CUDA device"):
        kernels.scored_attention(draw(3, 16, "none"))


def test_shapes_without_data_are_counted_by_torchs_operations() -> None:
    kernels = pytest.importorskip("cpvit.kernels.triton_attention", exc_type=ImportError)
    given = draw(9, 16, "sizes")
    meta = AttentionInputs(*(each.to("meta") if isinstance(each, Tensor) else each for each in given))
    got = kernels.scored_attention(meta)
    assert (got.out.shape, got.evidence.shape) == ((2, 3, 9, 16), (2, 3, 9))


def test_the_kernel_takes_the_largest_head_dimension_it_names() -> None:
    kernels = pytest.importorskip("cpvit.kernels.triton_attention", exc_type=ImportError)
    kernels.check(draw(3, 128, "none"))


def test_the_kernel_refuses_tensors_that_require_grad() -> None:
    """Without a CUDA device, the device is pretended: the refusal comes before anything is launched."""
    kernels = pytest.importorskip("cpvit.kernels.triton_attention", exc_type=ImportError)
    pretended: Any = SimpleNamespace(device=torch.device("cuda"), requires_grad=True)
    given = AttentionInputs(pretended, pretended, pretended, 1.0)
    with pytest.raises(
        RuntimeError, match=r"attention_kernel='triton' has no backward pass; run the model inside"
    ):
        kernels.scored_attention(given)
