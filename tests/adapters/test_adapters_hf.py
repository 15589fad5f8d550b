"""Models of Hugging Face transformers under the cascade, against the models themselves.

Sizes: patches of 8 pixels, C=24 channels in H=3 heads, 3 layers, grids that are not square where the family
allows it. The oracle (:func:`masked_host`) lets no token leave: it runs the host's own layers and hides
removed patches from the next layer on by a mask.
"""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import cpvit
from cpvit.adapters import UnsupportedModelError, hf_families, open_host
from cpvit.adapters import hf as adapter
from cpvit.plans.costs import cost_model
from cpvit.plans.macs import count_macs
from cpvit.pruning.heads import SlicedHeads

transformers = pytest.importorskip("transformers")

COMMON = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 8}
OBLONG = {**COMMON, "intermediate_size": 40, "image_size": (40, 24)}
SQUARE = {**COMMON, "intermediate_size": 40, "image_size": 32}
# DINOv2 interpolates its positions from a square grid: 8 x 2 patches come from 4 x 4.
DINO = {**COMMON, "mlp_ratio": 2, "image_size": (64, 16), "layerscale_value": 0.7}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "projection_size": 24,
}


def vit(name: str) -> nn.Module:
    return getattr(transformers, name)(transformers.ViTConfig(**OBLONG, num_labels=7))


def deit(name: str) -> nn.Module:
    return getattr(transformers, name)(transformers.DeiTConfig(**OBLONG, num_labels=7))


def dinov2(name: str) -> nn.Module:
    return getattr(transformers, name)(transformers.Dinov2Config(**DINO, num_labels=7, use_swiglu_ffn=True))


def registers(name: str) -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(
        **DINO, num_labels=7, num_register_tokens=2, qkv_bias=False
    )
    return getattr(transformers, name)(config)


def clip_tower(name: str) -> nn.Module:
    return getattr(transformers, name)(transformers.CLIPVisionConfig(**SQUARE, projection_dim=5))


def clip_both(name: str) -> nn.Module:
    config = transformers.CLIPConfig(vision_config=SQUARE, text_config=TEXT, num_labels=7)
    return getattr(transformers, name)(config)


def siglip_tower(name: str) -> nn.Module:
    return getattr(transformers, name)(transformers.SiglipVisionConfig(**SQUARE))


def siglip_both(name: str) -> nn.Module:
    config = transformers.SiglipConfig(vision_config=SQUARE, text_config=TEXT, num_labels=7)
    return getattr(transformers, name)(config)


BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "ViTModel": vit,
    "ViTForImageClassification": vit,
    "DeiTModel": deit,
    "DeiTForImageClassification": deit,
    "DeiTForImageClassificationWithTeacher": deit,
    "Dinov2Model": dinov2,
    "Dinov2ForImageClassification": dinov2,
    "Dinov2WithRegistersModel": registers,
    "Dinov2WithRegistersForImageClassification": registers,
    "CLIPVisionModel": clip_tower,
    "CLIPVisionModelWithProjection": clip_tower,
    "CLIPForImageClassification": clip_both,
    "SiglipVisionModel": siglip_tower,
    "SiglipForImageClassification": siglip_both,
}
TOWERS = [name for name in BUILDERS if name.endswith("Model")]
PREFIX = {"ViT": 1, "DeiT": 2, "Dinov2": 1, "Dinov2WithRegisters": 3, "CLIP": 1, "Siglip": 0}


def build(name: str) -> nn.Module:
    """A model whose every weight, LayerScale and bias matters, in float64."""
    torch.manual_seed(0)
    return randomised(BUILDERS[name](name)).double().eval()


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        gain = parameter.dim() == 1 and name.endswith(
            ("norm.weight", "norm1.weight", "norm2.weight", "lambda1")
        )
        parameter.copy_(0.25 * torch.randn_like(parameter) + float(gain))
    return model


def images_for(model: nn.Module, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    host = open_host(model)
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, *host.image_shape, generator=generator).to(dtype)


def output(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return open_host(model).output(model(images))


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [block.module for block in open_host(model).blocks]


@pytest.fixture(params=BUILDERS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


@pytest.fixture(params=TOWERS)
def tower(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def test_host_describes_the_model(model: nn.Module) -> None:
    host = open_host(model)
    family = next(
        name for name in sorted(PREFIX, key=len, reverse=True) if type(model).__name__.startswith(name)
    )
    assert host.num_prefix == PREFIX[family]
    tokens = []
    hook = host.blocks[0].module.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    model(images_for(model))
    hook.remove()
    assert tokens == [host.num_tokens]
    assert host.image_shape[1:] == (8 * host.grid[0], 8 * host.grid[1])
    assert host.name == f"{type(model).__name__}-3x24-patch8"


@pytest.mark.parametrize(
    ("name", "pools"),
    [
        ("ViTForImageClassification", False),
        ("DeiTForImageClassificationWithTeacher", False),
        ("Dinov2Model", False),
        ("Dinov2ForImageClassification", True),
        ("Dinov2WithRegistersForImageClassification", True),
        ("CLIPVisionModelWithProjection", False),
        ("CLIPForImageClassification", True),
        ("SiglipVisionModel", True),
        ("SiglipForImageClassification", True),
    ],
)
def test_heads_that_read_patches_are_known(name: str, pools: bool) -> None:
    assert open_host(build(name)).pools_patches is pools


def test_siglip_without_its_head_pools_nothing() -> None:
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SQUARE, vision_use_head=False))
    host = open_host(model.eval())
    assert not host.pools_patches
    assert host.pool_token_macs == 0
    assert output(model, images_for(model)).shape == (2, 16, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeping_everything_changes_nothing(model: nn.Module, dtype: torch.dtype) -> None:
    result = cpvit.verify(model.to(dtype))
    assert result.passed, result.summary()


def test_keeping_everything_changes_nothing_of_eager_attention(tower: nn.Module) -> None:
    tower.float().set_attn_implementation("eager")
    result = cpvit.verify(tower)
    assert result.passed, result.summary()


@contextmanager
def captured(module: nn.Module, into: list[Tensor]) -> Iterator[None]:
    hook = module.register_forward_hook(lambda _module, _args, result: into.append(result))
    yield
    hook.remove()


@torch.no_grad()
def masked_host(
    model: nn.Module, images: Tensor, keep: Sequence[int], num_prefix: int
) -> tuple[Tensor, Tensor]:
    """The paper's cascade by the host's own layers: tokens [B N C] of the last one, and alive [B N]."""
    layers, entering = layers_of(model), []
    hook = layers[0].register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
    model(images)
    hook.remove()
    x = entering[0]
    alive = torch.ones(x.shape[:2], dtype=torch.bool)
    score = torch.zeros(x.shape[:2], dtype=torch.float64)
    for layer, count in zip(layers, keep, strict=True):
        mask = torch.zeros(x.shape[:2], dtype=x.dtype).masked_fill(~alive, -torch.inf)[:, None, None]
        x, probs = layer_with_probabilities(layer, x, mask)
        for image in range(len(x)):
            score[image] += probs[image][:, alive[image]].amax(dim=1).sum(dim=0)
        ranking = score.masked_fill(~alive, -torch.inf)[:, num_prefix:]
        kept = ranking.argsort(dim=1, descending=True)[:, :count] + num_prefix
        alive = torch.zeros_like(alive).scatter(1, kept, True)
        alive[:, :num_prefix] = True
    return x, alive


def layer_with_probabilities(layer: nn.Module, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer returns, and its attention [B H N N] from what its own projections return."""
    attention = getattr(layer, "attention", None) or layer.self_attn
    query: list[Tensor] = []
    key: list[Tensor] = []
    with captured(attention.q_proj, query), captured(attention.k_proj, key):
        result = layer(x, mask)
    q, k = (tensor[0].unflatten(-1, (3, 8)).transpose(1, 2) for tensor in (query, key))
    return result, (q @ k.transpose(2, 3) / 8**0.5 + mask).softmax(dim=-1)


def final_norm(model: nn.Module) -> nn.Module:
    """What a tower applies to its last tokens before it returns them."""
    if isinstance(model, transformers.CLIPVisionModel):
        return nn.Identity()
    return model.post_layernorm if isinstance(model, transformers.SiglipVisionModel) else model.layernorm


def test_survivors_equal_those_of_a_masked_host(tower: nn.Module) -> None:
    keep, images = (11, 6, 6), images_for(tower, batch=3)
    num_prefix = open_host(tower).num_prefix
    tokens, alive = masked_host(tower, images, keep, num_prefix)
    expected = torch.stack([final_norm(tower)(row)[here] for row, here in zip(tokens, alive, strict=True)])

    cpvit.prune_(tower, cpvit.PruneConfig(keep_per_block=keep))
    with cpvit.record(tower) as trace, torch.no_grad():
        got = tower(images).last_hidden_state
    positions = torch.stack([row[num_prefix:].nonzero().flatten() for row in alive])
    assert torch.equal(trace.survivors[-1], positions)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


CUT = ((0, 2), (1, 2), (1,))


def test_cut_heads_equal_zeroed_columns_of_the_projection(tower: nn.Module) -> None:
    images, reference = images_for(tower), copy.deepcopy(tower)
    for block, kept in zip(open_host(reference).blocks, CUT, strict=True):
        for head in set(range(3)) - set(kept):
            block.projection.weight.data[:, 8 * head : 8 * head + 8] = 0
    plan = cpvit.prune_(tower, cpvit.PruneConfig(keep_rate=1.0))
    cpvit.prune_(tower, dataclasses.replace(plan, heads=CUT))
    torch.testing.assert_close(output(tower, images), output(reference, images), rtol=1e-10, atol=1e-10)


def test_the_hosts_own_forward_runs_with_cut_heads(tower: nn.Module) -> None:
    images = images_for(tower)
    plan = cpvit.prune_(tower, cpvit.PruneConfig(keep_rate=1.0))
    cpvit.prune_(tower, dataclasses.replace(plan, heads=CUT))
    expected = output(tower, images)
    cpvit.unprune_(tower)
    for block, kept in zip(open_host(tower).blocks, CUT, strict=True):
        SlicedHeads(block, kept)
    torch.testing.assert_close(output(tower, images), expected, rtol=1e-10, atol=1e-10)


def test_restoring_is_exact_and_the_keys_never_change(model: nn.Module) -> None:
    before, images = copy.deepcopy(model.state_dict()), images_for(model)
    expected = output(model, images)
    plan = cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    cpvit.prune_(model, dataclasses.replace(plan, heads=CUT))
    assert list(model.state_dict()) == list(before)
    assert not torch.equal(output(model, images), expected)
    cpvit.unprune_(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(output(model, images), expected)


def test_a_copy_of_a_pruned_model_is_pruned_alike_and_lives_alone(model: nn.Module) -> None:
    images = images_for(model)
    dense = output(model, images)
    plan = cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.4))
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, images), output(model, images))
    blocked_only(twin, model, images)
    cpvit.unprune_(model)
    assert cpvit.plan_of(twin) == plan
    assert not torch.equal(output(twin, images), dense)
    cpvit.unprune_(twin)
    assert torch.equal(output(twin, images), dense)


def switch_on_checkpointing(model: nn.Module) -> None:
    """By the name that is not deprecated in the version at hand."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def blocked_only(twin: nn.Module, model: nn.Module, images: Tensor) -> None:
    """A copy looks at its own settings, not at those of the model it was copied from."""
    twin.train()
    switch_on_checkpointing(twin)
    with pytest.raises(cpvit.PruningBypassError):
        twin(images)
    model.train()(images)
    model.eval()
    twin.eval()


def fine_grid(name: str) -> nn.Module:
    """With patches of 4 pixels, so that a budget can be met."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for options in (COMMON, OBLONG, SQUARE, DINO):
            patch.setitem(options, "patch_size", 4)
        return BUILDERS[name](name).eval()


@pytest.mark.parametrize("name", BUILDERS)
def test_counted_macs_equal_the_planned_ones(name: str) -> None:
    model = fine_grid(name)
    dense = count_macs(model)
    costs = cost_model(open_host(model))
    plan = cpvit.prune_(model, cpvit.PruneConfig(macs=0.6))
    assert count_macs(model) == costs.total(plan.patches_per_block)
    assert count_macs(model) / dense == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("name", ["DeiTForImageClassification", "Dinov2Model", "SiglipVisionModel"])
def test_counted_macs_equal_the_planned_ones_with_heads_cut(name: str) -> None:
    model = fine_grid(name)
    dense = count_macs(model)
    config = cpvit.PruneConfig(macs=0.6, head_keep_rate=0.4)
    plan = cpvit.prune_(model, config, calibration=images_for(model))
    assert plan.heads is not None
    assert len(plan.heads[-1]) == 1
    assert count_macs(model) / dense == pytest.approx(plan.macs_ratio, abs=1e-6)


@pytest.mark.parametrize("name", [*TOWERS, "Dinov2ForImageClassification"])
def test_compiles_without_a_graph_break(name: str) -> None:
    model = build(name)
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    images = images_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(open_host(model).output(compiled(images)), output(model, images))


@pytest.mark.parametrize("name", [*TOWERS, "Dinov2ForImageClassification"])
def test_exports_with_any_batch(name: str) -> None:
    model = build(name)
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    dynamic = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    with torch.no_grad():
        program = torch.export.export(model, (images_for(model),), dynamic_shapes=dynamic, strict=False)
        for batch in (1, 5):
            images = images_for(model, batch)
            got = open_host(model).output(program.module()(images))
            torch.testing.assert_close(got, output(model, images), rtol=1e-10, atol=1e-10)


def test_an_exported_graph_masks_nothing() -> None:
    """transformers builds an empty mask for its layers while exporting; the pruned model must not apply it."""
    model = build("ViTModel").float()
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    with torch.no_grad():
        program = torch.export.export(model, (images_for(model),), strict=False)
    softmaxes = [node for node in program.graph.nodes if "softmax" in str(node.target)]
    added = [node for node in softmaxes if "add" in str(node.args[0].target)]
    fused = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert softmaxes or fused
    assert not added
    assert all(len(node.args) < 4 and "attn_mask" not in node.kwargs for node in fused)


def test_recording_attention_is_refused(tower: nn.Module) -> None:
    cpvit.prune_(tower, cpvit.PruneConfig(keep_rate=0.5))
    with pytest.raises(
        cpvit.PruningBypassError, match=r"output_attentions is recorded by hooks.*come back empty"
    ):
        tower(images_for(tower), output_attentions=True)


def test_recording_attention_by_configuration_is_refused(tower: nn.Module) -> None:
    cpvit.prune_(tower, cpvit.PruneConfig(keep_rate=0.5))
    tower.set_attn_implementation("eager")  # transformers allows recorded attention only there
    tower.config.output_attentions = True
    with pytest.raises(cpvit.PruningBypassError, match="output_attentions"):
        tower(images_for(tower))
    tower(images_for(tower), output_attentions=False)


def hidden_states(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(images, output_hidden_states=True).hidden_states


def test_hidden_states_are_the_tokens_that_leave_each_block(model: nn.Module) -> None:
    images, keep = images_for(model), (11, 6, 6)
    dense = hidden_states(model, images)
    cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=keep))
    got, num_prefix = hidden_states(model, images), open_host(model).num_prefix
    assert [tokens.shape[1] - num_prefix for tokens in got] == [open_host(model).num_patches, *keep]
    assert torch.equal(got[0], dense[0])


@pytest.mark.parametrize("method", ["cpvit", "tome"])
def test_hidden_states_of_dense_features_are_the_full_grid(tower: nn.Module, method: str) -> None:
    if getattr(tower, "head", None) is not None:
        tower.head, tower.use_head = None, False
    images, num_prefix = images_for(tower), open_host(tower).num_prefix
    cpvit.prune_(tower, cpvit.PruneConfig(keep_rate=0.5, method=method))
    with cpvit.record(tower) as trace:
        short = hidden_states(tower, images)
    cpvit.prune_(tower, cpvit.PruneConfig(keep_rate=0.5, method=method), dense_features=True)
    grids = hidden_states(tower, images)
    assert all(grid.shape[1] == open_host(tower).num_tokens for grid in grids)
    for grid, tokens, positions in zip(grids[1:], short[1:], trace.survivors, strict=True):
        here = positions[:, :, None].expand(*positions.shape, 24) + num_prefix
        assert torch.equal(grid.gather(1, here), tokens[:, num_prefix:])


def test_keeping_everything_hidden_states_are_the_hosts(model: nn.Module) -> None:
    images = images_for(model)
    dense = hidden_states(model, images)
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=1.0))
    for got, expected in zip(hidden_states(model, images), dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_hook_that_returns_something_else_is_refused() -> None:
    model = build("ViTModel")
    model.layers[1].register_forward_hook(lambda module, args, output: output * 2)
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5), verify=False)
    with pytest.raises(cpvit.PruningBypassError, match="hook on block 1 of a pruned model returns something"):
        model(images_for(model))


def test_recording_layers_works_again_after_unprune(tower: nn.Module) -> None:
    cpvit.prune_(tower, cpvit.PruneConfig(keep_rate=0.5))
    cpvit.unprune_(tower)
    assert len(tower(images_for(tower), output_hidden_states=True).hidden_states) == 4


def test_gradient_checkpointing_of_the_host_is_refused(model: nn.Module) -> None:
    switch_on_checkpointing(model)
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    images = images_for(model)
    model(images)  # it does nothing in eval mode
    model.train()
    with torch.no_grad():
        model(images)
    with pytest.raises(
        cpvit.PruningBypassError, match=r"gradient checkpointing.*prune_\(\.\.\., checkpointing=True"
    ):
        model(images)


def test_checkpointing_inside_the_cascade_gives_the_same_gradients() -> None:
    model = build("Dinov2ForImageClassification").train()
    images, labels = images_for(model), torch.tensor([3, 5])
    gradients = []
    for checkpointing in (False, True):
        cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5), checkpointing=checkpointing)
        model.zero_grad()
        model(images, labels=labels).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    pairs = list(zip(*gradients, strict=True))
    assert any(first is not None and first.abs().sum() > 0 for first, _ in pairs)
    for first, second in pairs:
        torch.testing.assert_close(first, second)


def test_a_mask_is_refused_unless_it_masks_nothing() -> None:
    model = build("ViTForImageClassification")
    images, mask = images_for(model), torch.ones(2, 16, dtype=torch.long)
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    assert torch.equal(model(images, attention_mask=mask).logits, model(images).logits)
    mask[:, 5] = 0
    with pytest.raises(
        ValueError, match="cannot take attention_mask: it speaks of patches that may have left"
    ):
        model(images, attention_mask=mask)


def test_a_layer_called_alone_is_refused() -> None:
    model = build("CLIPVisionModel")
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    with pytest.raises(cpvit.PruningBypassError, match=r"block 1 \(CLIPEncoderLayer\).*called directly"):
        model.encoder.layers[1](torch.zeros(1, 17, 24, dtype=torch.float64), None)


def test_other_arguments_and_tuples_pass_through() -> None:
    model = build("ViTForImageClassification")
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    images = images_for(model)
    logits = model(images).logits
    assert torch.equal(model(pixel_values=images, return_dict=False)[0], logits)
    assert torch.equal(model(images, num_items_in_batch=2).logits, logits)
    assert torch.equal(adapter.tensor_of(model(images, return_dict=False)), logits)


def test_a_two_tower_model_runs_with_its_image_tower_pruned() -> None:
    torch.manual_seed(0)
    model = clip_both("CLIPModel").eval()
    cpvit.prune_(model.vision_model, cpvit.PruneConfig(keep_rate=0.5))
    with cpvit.record(model.vision_model) as trace:
        logits = model(torch.tensor([[0, 5, 1]]), torch.randn(2, 3, 32, 32)).logits_per_image
    assert logits.shape == (2, 1)
    assert trace.survivors[-1].shape == (2, 8)


def test_plan_and_name_survive_saving_to_another_place(tmp_path) -> None:
    model = build("Dinov2ForImageClassification")
    plan = cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    images = images_for(model)
    expected = output(model, images)
    cpvit.unprune_(model)
    model.save_pretrained(tmp_path / "elsewhere")
    again = type(model).from_pretrained(tmp_path / "elsewhere").double()
    cpvit.prune_(again, plan)
    torch.testing.assert_close(output(again, images), expected)


def test_dense_features_give_back_every_patch() -> None:
    model = build("Dinov2WithRegistersModel")
    images = images_for(model)
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    short = model(images).last_hidden_state
    assert short.shape == (2, 3 + 8, 24)
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5), dense_features=True)
    with cpvit.record(model) as trace:
        full = model(images).last_hidden_state
    assert full.shape == (2, 3 + 16, 24)
    here = trace.survivors[-1][:, :, None].expand(2, 8, 24) + 3
    assert torch.equal(full.gather(1, here), short[:, 3:])


def test_another_image_size_is_refused_with_the_way_out() -> None:
    model = build("Dinov2Model")
    cpvit.prune_(model, cpvit.PruneConfig(keep_rate=0.5))
    images = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    message = r"pruned for 16 patches \(8x2\) and got 9; .*prune the model anew .*set model.config.image_size"
    with pytest.raises(ValueError, match=message):
        model(images)
    model.config.image_size = 24
    plan = cpvit.prune_(model, cpvit.PruneConfig(keep_per_block=(9, 6, 4)))
    assert plan.num_patches == 9
    assert model(images).last_hidden_state.shape == (1, 5, 24)


def test_a_subclass_of_a_known_model_is_known() -> None:
    class Mine(transformers.ViTForImageClassification):
        pass

    assert open_host(Mine(transformers.ViTConfig(**OBLONG))).name == "Mine-3x24-patch8"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: clip_both("CLIPModel"),
            r"CLIPModel cannot be pruned: it has 2 stacks of layers.*prune_\(model.vision_model",
        ),
        (lambda: siglip_both("SiglipModel"), r"SiglipModel.*2 stacks of layers"),
        (
            lambda: vit("ViTForMaskedImageModeling"),
            r"its decoder \(Sequential\) may need every patch.*prune_\(model.vit, ..., dense_features=True\)",
        ),
        (lambda: deit("DeiTForMaskedImageModeling"), "its decoder"),
        (
            lambda: transformers.Siglip2VisionModel(
                transformers.Siglip2VisionConfig(**COMMON, num_patches=16)
            ),
            "fixed resolution load as SiglipVisionModel",
        ),
        (
            lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
            r"CLIPTextModel cannot be pruned: it reads input_ids first; give a model, or a tower, that sees",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        open_host(make())


@pytest.mark.parametrize("name", hf_families.REFUSED)
def test_every_class_refused_by_name_exists(name: str) -> None:
    assert getattr(transformers, name)
    stand_in = type(name, (nn.Module,), {"__module__": "transformers.models"})()
    with pytest.raises(UnsupportedModelError, match=rf"^{name} cannot be pruned: it "):
        open_host(stand_in)


def test_attention_with_masks_of_its_own_is_refused() -> None:
    model = build("ViTModel")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(
        UnsupportedModelError, match=r"'flex_attention'; call model.set_attn_implementation\(\"sdpa\""
    ):
        cpvit.prune_(model)


def test_a_changed_layer_is_refused() -> None:
    class Odd(nn.Module):
        pass

    model = build("ViTModel")
    model.layers[1].attention = Odd()
    with pytest.raises(
        UnsupportedModelError, match="ViTModel cannot be pruned: Odd has no projections of query"
    ):
        open_host(model)


def test_heads_of_a_wrapped_projection_are_not_cut() -> None:
    class Wrapped(nn.Linear):
        pass

    model = build("ViTModel")
    plan = cpvit.prune_(model, cpvit.PruneConfig(keep_rate=1.0))
    model.layers[0].attention.k_proj = Wrapped(24, 24).double()
    with pytest.raises(UnsupportedModelError, match=r"a projection is a Wrapped .*prune patches only"):
        cpvit.prune_(model, dataclasses.replace(plan, heads=CUT))


@pytest.mark.parametrize("version", ["4.57.6", "5.17.0", "6.0.0.dev0"])
def test_another_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit("ViTModel")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    expected = rf"transformers {version} is installed.*5\.18 to 5\.x.*pip install 'transformers>=5\.18,<6'"
    with pytest.raises(UnsupportedModelError, match=expected):
        open_host(model)


def test_an_unknown_output_is_an_error() -> None:
    with pytest.raises(TypeError, match="object holds no image features"):
        adapter.tensor_of(object())


@pytest.mark.parametrize("block", ["", "sys.modules['transformers'] = None;"])
def test_cpvit_does_not_import_transformers(block: str) -> None:
    code = (
        f"import sys; {block} import timm, cpvit;"
        "cpvit.prune_(timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2));"
        "assert not sys.modules.get('transformers')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
