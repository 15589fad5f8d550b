"""Three routes through one attention: they must agree, and the evidence must be what the page says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpvit import attention
from cpvit.attention import AttentionInputs, attend

EXACT = {"rtol": 0, "atol": 1e-12}


def inputs(batch: int = 3, heads: int = 2, tokens: int = 9, *, bias: bool = False) -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = (draw(batch, heads, tokens, 4) for _ in range(3))
    return AttentionInputs(
        query, key, value, scale=0.7, bias=draw(batch, heads, tokens, tokens) if bias else None
    )


def matrix(given: AttentionInputs) -> Tensor:
    logits = torch.einsum("bhid,bhjd->bhij", given.query, given.key) * given.scale
    return (logits if given.bias is None else logits + given.bias).softmax(dim=-1)


@pytest.mark.parametrize("bias", [False, True])
def test_every_route_gives_the_same_output(bias: bool) -> None:
    given = inputs(bias=bias)
    expected = matrix(given) @ given.value
    for options in (
        {},
        {"return_probs": True},
        {"evidence": "max"},
        {"evidence": "class"},
        {"evidence": "class", "num_prefix": 0},
    ):
        torch.testing.assert_close(attend(given, **options).out, expected, **EXACT)


@pytest.mark.parametrize("bias", [False, True])
def test_max_evidence_is_the_strongest_attention_any_query_pays(bias: bool) -> None:
    given = inputs(bias=bias)
    torch.testing.assert_close(attend(given, evidence="max").evidence, matrix(given).amax(2), **EXACT)


@pytest.mark.parametrize("return_probs", [False, True])
def test_class_evidence_is_the_class_tokens_row(return_probs: bool) -> None:
    given = inputs(bias=True)
    got = attend(given, evidence="class", num_prefix=1, return_probs=return_probs).evidence
    torch.testing.assert_close(got, matrix(given)[:, :, 0], **EXACT)


def test_class_evidence_without_a_class_token_is_the_mean_over_queries() -> None:
    given = inputs()
    got = attend(given, evidence="class", num_prefix=0).evidence
    torch.testing.assert_close(got, matrix(given).mean(2), **EXACT)


def test_nothing_is_scored_unless_asked_for() -> None:
    attended = attend(inputs())
    assert attended.evidence is None
    assert attended.probs is None


def test_probabilities_are_returned_on_request() -> None:
    given = inputs()
    torch.testing.assert_close(attend(given, return_probs=True).probs, matrix(given), **EXACT)


@pytest.mark.parametrize("bias_images", [None, 1, 7])
@pytest.mark.parametrize("images_at_once", [1, 2, 3, 6])
def test_chunks_give_what_the_whole_batch_gives(
    monkeypatch: pytest.MonkeyPatch, images_at_once: int, bias_images: int | None
) -> None:
    given = inputs(batch=7, bias=True)
    given = given._replace(bias=None if bias_images is None else given.bias[:bias_images])
    whole = attend(given, evidence="max", return_probs=True)
    monkeypatch.setattr(attention, "CHUNK_BYTES", images_at_once * 2 * 9 * 9 * 8)
    pieces = attend(given, evidence="max")
    torch.testing.assert_close(pieces.out, whole.out, **EXACT)
    torch.testing.assert_close(pieces.evidence, whole.evidence, **EXACT)


@pytest.mark.parametrize("kind", ["none", "max", "class"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_token_of_size_k_weighs_as_much_as_k_copies_of_it(kind: str, bias: bool) -> None:
    """Proportional attention: softmax(logits + log size) is attention over the copies, added up."""
    counts = torch.tensor([1, 3, 1, 2])
    few = inputs(batch=2, tokens=4, bias=bias)
    where = torch.repeat_interleave(torch.arange(4), counts)
    many = few._replace(
        key=few.key[:, :, where],
        value=few.value[:, :, where],
        bias=None if few.bias is None else few.bias[..., where],
    )
    got = attend(few, sizes=counts.expand(2, 4).double(), evidence=kind)
    torch.testing.assert_close(got.out, matrix(many) @ many.value, **EXACT)


def test_sizes_count_in_the_evidence_too() -> None:
    given, sizes = inputs(), torch.rand(3, 9, dtype=torch.float64) + 0.5
    expected = matrix(given._replace(bias=sizes.log()[:, None, None, :])).amax(2)
    torch.testing.assert_close(attend(given, sizes=sizes, evidence="max").evidence, expected, **EXACT)


def test_dropout_acts_on_the_output_and_not_on_the_evidence() -> None:
    given = inputs()
    dropped = attend(given._replace(dropout=0.5), evidence="max")
    torch.testing.assert_close(dropped.evidence, attend(given, evidence="max").evidence, **EXACT)
    assert not torch.allclose(dropped.out, attend(given).out)


def test_the_fused_route_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    attend(inputs())
    assert len(calls) == 1
    attend(trainable(inputs()), evidence="class")
    assert len(calls) == 2
    attend(inputs(), evidence="max")
    attend(inputs(batch=8), evidence="class")
    attend(trainable(inputs()), evidence="max")
    assert len(calls) == 2
    attend(inputs(batch=1), evidence="class")
    assert len(calls) == 3, "one image: too few matrices for the workspace to pay"


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("tokens", [7, 16])
def test_sizes_reach_every_query_on_both_routes(batch: int, tokens: int) -> None:
    """The workspace pads one row of a bias; a row for each query it does not."""
    given, sizes = inputs(batch=batch, tokens=tokens), torch.rand(batch, tokens, dtype=torch.float64) + 0.5
    whole = sizes.log()[:, None, None, :].expand(batch, 1, tokens, tokens)
    expected = matrix(given._replace(bias=whole))
    got = attend(given, sizes=sizes, evidence="class")
    torch.testing.assert_close(got.out, expected @ given.value, **EXACT)
    torch.testing.assert_close(got.evidence, expected[:, :, 0], **EXACT)
    by_rows = attend(given._replace(bias=whole), evidence="max")
    torch.testing.assert_close(by_rows.evidence, expected.amax(2), **EXACT)


def trainable(given: AttentionInputs) -> AttentionInputs:
    """Inputs that autograd follows: buffers must then not be written in place."""
    return given._replace(query=given.query.clone().requires_grad_())


@pytest.mark.parametrize("kind", ["max", "class"])
@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_autograd_sees_what_inference_computes(kind: str, num_prefix: int, bias: bool) -> None:
    given = inputs(bias=bias)
    plain = attend(given, evidence=kind, num_prefix=num_prefix)
    followed = attend(trainable(given), evidence=kind, num_prefix=num_prefix)
    torch.testing.assert_close(plain.out, followed.out, **EXACT)
    torch.testing.assert_close(plain.evidence, followed.evidence, **EXACT)
    assert followed.out.requires_grad
    assert followed.evidence.requires_grad


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 4), (3, 4), (2, 4)])
def test_heads_are_done_in_groups_where_one_image_is_too_large(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    images, heads = shape
    given = inputs(batch=3, heads=4, bias=True)
    monkeypatch.setattr(attention, "CHUNK_BYTES", images * heads * 9 * 9 * 8)
    pieces = attend(given, evidence="max")
    torch.testing.assert_close(pieces.out, matrix(given) @ given.value, **EXACT)
    torch.testing.assert_close(pieces.evidence, matrix(given).amax(2), **EXACT)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30], ids=["pieces", "whole"])
def test_no_number_of_tokens_lets_the_padding_count(
    tokens: int, dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_budget", lambda query: chunk_bytes)
    given = inputs(tokens=tokens)
    low = given._replace(
        query=given.query.to(dtype), key=given.key.to(dtype), value=torch.ones_like(given.value, dtype=dtype)
    )
    got = attend(low, evidence="class", num_prefix=0)
    assert got.evidence.shape == (3, 2, tokens)
    close = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(got.out, torch.ones_like(low.value), **close)
    torch.testing.assert_close(got.evidence.sum(-1), torch.ones(3, 2, dtype=dtype), **close)


def test_one_image_of_a_usual_model_is_one_piece() -> None:
    """Each piece costs some twenty operations, which for one image is what takes the time."""
    for heads in (3, 6, 12):
        query = torch.empty(1, heads, 197, 64)
        assert len(list(attention._pieces(query, attention._budget(query)))) == 1


def test_the_output_of_pieces_joins_its_heads_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    assert attend(inputs(), evidence="max").out.transpose(1, 2).is_contiguous()


def test_a_bias_that_autograd_follows_gets_its_gradient() -> None:
    """A learned relative position bias may be all that is trained."""
    given = inputs(bias=True)
    given = given._replace(bias=given.bias.clone().requires_grad_())
    attended = attend(given, evidence="max")
    attended.out.sum().backward()
    assert given.bias.grad is not None


def test_the_workspace_is_left_alone_where_operations_are_recast_traced_or_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = inputs()
    assert attention._can_use_workspace(given)
    with torch.autocast("cpu", torch.bfloat16):
        assert not attention._can_use_workspace(given)
    assert not attention._can_use_workspace(given._replace(dropout=0.1))

    def flag(query: Tensor) -> Tensor:
        return query.new_full((), float(attention._can_use_workspace(given._replace(query=query))))

    with torch.inference_mode():
        assert flag(given.query) == 1
        assert torch.compile(flag, backend="eager")(given.query) == 0
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert not attention._can_use_workspace(given)
