"""open_clip's VisionTransformer under the cascade, alone and in a two-tower model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cpvit
from cpvit.adapters import UnsupportedModelError, open_host
from cpvit.measure.support import randomize_
from cpvit.plans.costs import cost_model
from cpvit.plans.macs import count_macs

open_clip = pytest.importorskip("open_clip")

TOWERS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average, LayerScale": {"pool_type": "avg", "ls_init_value": 0.5},
    "attention pooling": {"attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 3},
    "two attention poolings": {
        "attentional_pool": "parallel",
        "attn_pooler_queries": 6,
        "attn_pooler_heads": 3,
        "output_tokens": True,
    },
    "norms everywhere": {"qk_norm": True, "scale_attn": True, "scale_fc": True},
    "tokens in front of images": {},
    "two towers": {},
}
SIZE = {"image_size": 64, "patch_size": 16, "width": 48, "layers": 4, "mlp_ratio": 2.0}


def build(name: str, **values: object) -> nn.Module:
    torch.manual_seed(0)
    if name == "two towers":
        text = {"context_length": 8, "vocab_size": 64, "width": 24, "heads": 2, "layers": 1}
        model = open_clip.model.CLIP(12, {**SIZE, "head_width": 12}, text)
    else:
        model = open_clip.transformer.VisionTransformer(
            **{**SIZE, "heads": 4, "output_dim": 48, **TOWERS[name], **values}
        )
    if name == "tokens in front of images":
        model.transformer = open_clip.transformer.Transformer(48, 4, 4, 2.0, batch_first=False)
    randomize_(model)
    return model.eval()


@pytest.fixture(params=TOWERS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def output(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return open_host(model).output(model(images))


def test_keeping_everything_changes_nothing(model: nn.Module) -> None:
    result = cpvit.verify(model)
    assert result.error < 1e-5, result.summary()


def test_pruned_counted_and_restored(model: nn.Module) -> None:
    before, dense, costs = output(model), count_macs(model), cost_model(open_host(model))
    plan = cpvit.prune_(model, cpvit.PruneConfig(macs=0.7))
    assert count_macs(model) == costs.total(plan.patches_per_block)
    assert count_macs(model) / dense == pytest.approx(0.7, abs=0.01)
    pruned = output(model)
    torch.testing.assert_close(output(model, IMAGES[1:2]), pruned[1:2], rtol=1e-4, atol=1e-5)
    cpvit.prune_(model, cpvit.PruneConfig(macs=0.7, head_keep_rate=0.5), calibration=IMAGES)
    assert open_host(model).blocks[-1].num_heads == 2
    assert output(model).isfinite().all()
    cpvit.unprune_(model)
    assert torch.equal(output(model), before)


def test_compiles_and_exports(model: nn.Module) -> None:
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    host, expected = open_host(model), output(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(host.output(compiled(IMAGES)), expected, rtol=1e-4, atol=1e-4)
        exported = torch.export.export(model, (IMAGES,), strict=False).module()
        torch.testing.assert_close(host.output(exported(IMAGES)), expected, rtol=1e-4, atol=1e-4)


def test_inner_blocks_give_fewer_and_fewer_tokens() -> None:
    model: Any = build("class token")
    cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=(12, 9, 7, 7)))
    inner = model.forward_intermediates(IMAGES, output_fmt="NLC")["image_intermediates"]
    assert [tokens.shape[1] for tokens in inner] == [12, 9, 7, 7]
    cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=(12, 9, 7, 7)), dense_features=True)
    maps = model.forward_intermediates(IMAGES)["image_intermediates"]
    assert [tuple(grid.shape) for grid in maps] == [(3, 48, 4, 4)] * 4


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"scale_heads": True}, "block 0 scales each head"),
        ({"scaled_cosine_attn": True}, "block 0 scales each head"),
        ({"scale_attn_inner": True}, "block 0 normalises the joined heads"),
    ],
)
def test_what_is_not_known_is_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"open_clip's VisionTransformer cannot be pruned: {reason}"
    ):
        open_host(build("class token", **values))


def test_its_own_checkpointing_is_refused() -> None:
    model: Any = build("class token")
    cpvit.prune_(model)
    model.set_grad_checkpointing()
    with pytest.raises(cpvit.PruningBypassError, match="open_clip's own gradient checkpointing"):
        model(IMAGES)
