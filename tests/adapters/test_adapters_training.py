"""What acts in training only, dropout and stochastic depth: with everything kept, a block drops what the host drops.

Verification runs in eval mode and cannot see these parts. Here each drops with probability 1, so that the result
does not depend on the random state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import randomize_
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from cpvit import PruneConfig, prune_
from cpvit.adapters import open_host

KEEP = PruneConfig(keep_rate=1.0)
# transformers divides by the probability of keeping, which must not be 0.
ALWAYS = {"p": 1.0, "dropout": 1.0, "attention_dropout": 1.0, "drop_prob": 1 - 1e-9}


def timm_model(name: str, **options: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 7}
    model: nn.Module = timm.create_model(name, **{**sizes, **options})
    return model


def transformers_model(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    kind = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class(**sizes, image_size=32, patch_size=8, drop_path_rate=0.1))
    return model


def torchvision_model() -> nn.Module:
    return TorchvisionViT(image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=40)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm_model("vit_tiny_patch16_224", drop_path_rate=0.1),
    "vit norm after": lambda: timm_model("vit_base_patch16_rpn_224", drop_path_rate=0.1),
    "vit relpos": lambda: timm_model("vit_relpos_small_patch16_224", drop_path_rate=0.1),
    "eva": lambda: timm_model("eva02_tiny_patch14_224", drop_path_rate=0.1),
    "beit": lambda: timm_model("beit_base_patch16_224", drop_path_rate=0.1),
    "torchvision": torchvision_model,
    "transformers vit": lambda: transformers_model("ViTModel"),
    "transformers dinov2": lambda: transformers_model("Dinov2Model"),
    "transformers clip": lambda: transformers_model("CLIPVisionModel"),
    "transformers siglip": lambda: transformers_model("SiglipVisionModel"),
}


def switches(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(place, module, attribute) of every probability in the blocks."""
    found: list[tuple[str, nn.Module, str]] = []
    for number, block in enumerate(open_host(model).blocks):
        for path, module in block.module.named_modules():
            place = f"block {number}, {path}"
            if isinstance(module, nn.Dropout):
                found.append((place, module, "p"))
            elif isinstance(module, DropPath) or "drop_prob" in vars(module):
                found.append((place, module, "drop_prob"))
            for name in ("dropout", "attention_dropout"):
                if isinstance(vars(module).get(name), float):
                    found.append((place, module, name))
    return found


def set_all(model: nn.Module, probability: float) -> None:
    for _, module, attribute in switches(model):
        setattr(module, attribute, probability)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    return open_host(model).output(model(images))


@pytest.mark.parametrize("name", BUILDERS)
def test_every_dropout_and_drop_path_of_the_host_acts(name: str) -> None:
    host = BUILDERS[name]()
    randomize_(host, 0)
    host.double().eval()
    plain = output(host)
    pruned = copy.deepcopy(host)
    prune_(pruned, KEEP)
    host.train()
    pruned.train()
    pairs = list(zip(switches(host), switches(pruned), strict=True))
    set_all(host, 0.0)
    set_all(pruned, 0.0)
    acting = 0
    for (place, module, attribute), (_, twin, _) in pairs:
        for owner in (module, twin):
            setattr(owner, attribute, ALWAYS[attribute])
        expected = output(host)
        acting += not torch.allclose(expected, plain)
        torch.testing.assert_close(output(pruned), expected, rtol=1e-9, atol=1e-9, msg=place)
        for owner in (module, twin):
            setattr(owner, attribute, 0.0)
    assert acting >= 2, "the host itself drops nothing: this test would show nothing"
