"""torchvision's VisionTransformer under the cascade, against the model itself.

Sizes: 3 blocks, C=24 channels in H=3 heads, 5 x 5 patches of 4 pixels. The oracle lets no token leave: it runs
the host's own modules, ``nn.MultiheadAttention`` included, and hides removed patches by its key padding mask.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vision_transformer as vit

import cpvit
from cpvit.adapters import UnsupportedModelError, open_host
from cpvit.plans.costs import cost_model
from cpvit.plans.macs import count_macs

STEM = [vit.ConvStemConfig(out_channels=8, kernel_size=3, stride=2), vit.ConvStemConfig(12, 3, 2)]
CUT = ((0, 2), (1, 2), (1,))


@torch.no_grad()
def build(**options: object) -> nn.Module:
    """A model whose every weight and bias matters, in float64 (torchvision starts its classifier at zero)."""
    torch.manual_seed(0)
    size = {
        "image_size": 20,
        "patch_size": 4,
        "num_layers": 3,
        "num_heads": 3,
        "hidden_dim": 24,
        "mlp_dim": 40,
    }
    model = vit.VisionTransformer(**{**size, "num_classes": 7, **options})
    for name, parameter in model.named_parameters():
        gain = parameter.dim() == 1 and name.endswith(("ln_1.weight", "ln_2.weight", "ln.weight"))
        parameter.copy_(0.25 * torch.randn_like(parameter) + float(gain))
    return model.double().eval()


@pytest.fixture
def model() -> nn.Module:
    return build()


def images_for(model: nn.Module, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, *open_host(model).image_shape, generator=generator)
    return images.to(next(model.parameters()).dtype)


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def test_host_describes_the_model(model: nn.Module) -> None:
    host = open_host(model)
    assert (host.num_prefix, host.grid, host.image_shape, host.depth) == (1, (5, 5), (3, 20, 20), 3)
    assert host.family == "torchvision ViT"
    assert host.name == "VisionTransformer-3x24-patch4"


@pytest.mark.parametrize(
    ("name", "patches"),
    [("vit_b_16", 196), ("vit_b_32", 49), ("vit_l_16", 196), ("vit_l_32", 49), ("vit_h_14", 256)],
)
def test_models_of_torchvision_are_known_by_name(name: str, patches: int) -> None:
    with torch.device("meta"):
        host = open_host(getattr(vit, name)())
    assert (host.name, host.num_patches) == (name, patches)


def test_a_real_architecture_can_be_pruned() -> None:
    model = vit.vit_b_32(image_size=96).eval()
    plan = cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    assert plan.patches_per_block[-1] == round(0.5 * 9)
    assert run(model, images_for(model, 1)).shape == (1, 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"representation_size": 5}, {"conv_stem_configs": STEM}, {"dropout": 0.1, "attention_dropout": 0.2}],
    ids=["plain", "representation", "convolutional stem", "dropout"],
)
def test_keeping_everything_changes_nothing(options: dict[str, object], dtype: torch.dtype) -> None:
    result = cpvit.verify(build(**options).to(dtype))
    assert result.passed, result.summary()


@torch.no_grad()
def masked_host(model: nn.Module, images: Tensor, keep: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The paper's cascade by the host's own modules: logits [B classes] and alive [B N]."""
    blocks, entering = list(model.encoder.layers), []
    hook = blocks[0].register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
    model(images)
    hook.remove()
    x = entering[0]
    alive = torch.ones(x.shape[:2], dtype=torch.bool)
    score = torch.zeros(x.shape[:2], dtype=torch.float64)
    for block, count in zip(blocks, keep, strict=True):
        normed = block.ln_1(x)
        options = {"key_padding_mask": ~alive, "need_weights": True, "average_attn_weights": False}
        out, probs = block.self_attention(normed, normed, normed, **options)
        x = x + block.dropout(out)
        x = x + block.mlp(block.ln_2(x))
        for image in range(len(x)):
            score[image] += probs[image][:, alive[image]].amax(dim=1).sum(dim=0)
        ranking = score.masked_fill(~alive, -torch.inf)[:, 1:]
        kept = ranking.argsort(dim=1, descending=True)[:, :count] + 1
        alive = torch.zeros_like(alive).scatter(1, kept, True)
        alive[:, 0] = True
    return model.heads(model.encoder.ln(x)[:, 0]), alive


def test_survivors_equal_those_of_a_masked_host(model: nn.Module) -> None:
    keep, images = (19, 11, 7), images_for(model, batch=3)
    expected, alive = masked_host(model, images, keep)
    cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=keep))
    with cpvit.record(model) as trace:
        got = run(model, images)
    positions = torch.stack([row[1:].nonzero().flatten() for row in alive])
    assert torch.equal(trace.survivors[-1], positions)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_cut_heads_equal_zeroed_columns_of_the_projection(model: nn.Module, bias: bool) -> None:
    if not bias:
        for block in model.encoder.layers:
            block.self_attention.in_proj_bias = None
    images, reference = images_for(model), copy.deepcopy(model)
    for block, kept in zip(reference.encoder.layers, CUT, strict=True):
        for head in set(range(3)) - set(kept):
            block.self_attention.out_proj.weight.data[:, 8 * head : 8 * head + 8] = 0
    plan = cpvit.prune_(model, cpvit.PruneConfig(keep_rate=1.0))
    cpvit.prune_(model, dataclasses.replace(plan, heads=CUT))
    assert model.encoder.layers.encoder_layer_2.self_attention.in_proj_weight.shape == (3 * 8, 24)
    torch.testing.assert_close(run(model, images), run(reference, images), rtol=1e-10, atol=1e-10)


def test_restoring_is_exact_and_the_keys_never_change(model: nn.Module) -> None:
    before, images = copy.deepcopy(model.state_dict()), images_for(model)
    expected = run(model, images)
    plan = cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    cpvit.prune_(model, dataclasses.replace(plan, heads=CUT))
    assert list(model.state_dict()) == list(before)
    assert "encoder.layers.encoder_layer_0.ln_1.weight" in before
    cpvit.unprune_(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(run(model, images), expected)


def test_a_copy_of_a_pruned_model_lives_alone(model: nn.Module) -> None:
    images = images_for(model)
    dense = run(model, images)
    plan = cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.4))
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, images), run(model, images))
    cpvit.unprune_(model)
    assert cpvit.plan_of(twin) == plan
    assert not torch.equal(run(twin, images), dense)
    cpvit.unprune_(twin)
    assert torch.equal(run(twin, images), dense)


@pytest.mark.parametrize("head_keep_rate", [1.0, 0.4])
def test_counted_macs_equal_the_planned_ones(head_keep_rate: float) -> None:
    model = build(image_size=32)
    dense, costs = count_macs(model), cost_model(open_host(model))
    config = cpvit.PruneConfig(macs=0.6, head_keep_rate=head_keep_rate)
    plan = cpvit.prune_(model, config, calibration=images_for(model))
    assert count_macs(model) / dense == pytest.approx(plan.macs_ratio, abs=1e-6)
    assert count_macs(model) / dense == pytest.approx(0.6, abs=0.01)
    if plan.heads is None:
        assert count_macs(model) == costs.total(plan.patches_per_block)


def test_compiles_without_a_graph_break(model: nn.Module) -> None:
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images_for(model)), run(model, images_for(model)))


def test_exports_with_any_batch(model: nn.Module) -> None:
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    with torch.no_grad():
        program = torch.export.export(model, (images_for(model),), dynamic_shapes=dynamic, strict=False)
        for batch in (1, 5):
            images = images_for(model, batch)
            torch.testing.assert_close(program.module()(images), run(model, images), rtol=1e-10, atol=1e-10)


def test_it_trains_through_the_cascade() -> None:
    model = build(attention_dropout=0.2).train()
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5), checkpointing=True)
    model(images_for(model)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_ways_around_the_cascade_are_refused(model: nn.Module) -> None:
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    tokens = torch.zeros(1, 26, 24, dtype=torch.float64)
    with pytest.raises(cpvit.PruningBypassError, match=r"block 0 \(EncoderBlock\).*called directly"):
        model.encoder.layers.encoder_layer_0(tokens)
    with pytest.raises(cpvit.PruningBypassError, match="blocks 0 to 2 of a pruned model cannot be taken out"):
        model.encoder.layers[:2]


def test_changed_blocks_are_refused(model: nn.Module) -> None:
    class Attention(nn.MultiheadAttention):
        pass

    model.encoder.layers.encoder_layer_1.self_attention = Attention(24, 3, batch_first=True)
    with pytest.raises(
        UnsupportedModelError, match=r"block 1 of VisionTransformer uses Attention, .*only Multihead"
    ):
        open_host(model)
    model.encoder.layers.encoder_layer_1 = nn.Identity()
    with pytest.raises(
        UnsupportedModelError, match=r"block 1 of VisionTransformer is a Identity, .*EncoderBlock"
    ):
        open_host(model)
