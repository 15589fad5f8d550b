"""What the page shows of each block is what the library does there."""

from __future__ import annotations

import pytest
import torch
from conftest import random_images, tiny_vit

from cpvit import PruneConfig, prune_, record
from cpvit.adapters import open_host
from cpvit.app.watch import BlockView, watch
from cpvit.pruning.cascade import keep_everything
from cpvit.pruning.install import install


def watched(method: str, variant: str = "class") -> tuple[tuple[BlockView, ...], torch.nn.Module]:
    model = tiny_vit(variant)
    prune_(model, PruneConfig(method=method, macs=0.6), verify=False)
    return watch(open_host(model), random_images(1)), model


@pytest.mark.parametrize("method", ["cpvit", "cpvit-merge", "tome", "evit"])
def test_positions_and_carriers_are_those_of_record(method: str) -> None:
    views, model = watched(method)
    with record(model) as trace, torch.inference_mode():
        model(random_images(1))
    assert len(views) == 3
    for view, survivors, carrier in zip(views, trace.survivors, trace.carriers, strict=True):
        assert view.positions.tolist() == survivors[0].tolist()
        assert (view.carrier is None) == (carrier is None)
        if view.carrier is not None and carrier is not None:
            assert view.carrier.tolist() == carrier[0].tolist()


def test_the_class_attention_of_the_first_block_is_the_models_own() -> None:
    model = tiny_vit()
    host = open_host(model)
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        block = model.blocks[0]
        query, key, _ = block.attn.qkv(args[0]).reshape(1, 36, 3, 5, 6).permute(2, 0, 3, 1, 4)
        found.append((query @ key.transpose(-1, -2) * block.attn.scale).softmax(-1)[0, :, 0, 1:].mean(0))

    hook = model.blocks[0].attn.register_forward_pre_hook(keep)
    with torch.inference_mode():
        model(random_images(1))
    hook.remove()
    install(host, keep_everything(host))
    torch.testing.assert_close(watch(host, random_images(1))[0].attention, found[0].float())


def test_patches_that_left_have_no_attention() -> None:
    views, _ = watched("cpvit")
    gone = set(range(35)) - set(views[0].positions.tolist())
    assert gone
    assert set(views[1].attention.isnan().nonzero().flatten().tolist()) == gone
    assert not views[0].attention.isnan().any()


def test_merged_patches_share_the_attention_of_their_token() -> None:
    views, _ = watched("tome")
    carrier = views[0].carrier
    assert carrier is not None
    for token in range(len(views[0].positions)):
        assert views[1].attention[carrier == token].unique().numel() == 1
    assert not views[1].attention.isnan().any()


def test_without_a_class_token_it_is_the_attention_of_all_tokens() -> None:
    views, _ = watched("cpvit", "none")
    torch.testing.assert_close(views[0].attention.sum(), torch.tensor(1.0))


def test_an_untouched_model_is_refused() -> None:
    with pytest.raises(ValueError, match="is not pruned, so there is no cascade to watch"):
        watch(open_host(tiny_vit()), random_images(1))
