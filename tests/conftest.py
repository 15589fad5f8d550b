"""Small models with sizes that cannot be mistaken for one another, and the way to the shared files."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# pytest collects every message; torch's traces of its own compiler are many, long, and slow to format.
logging.getLogger("torch.__trace").disabled = True
torch.set_num_threads(1)  # two test processes on two cores: more threads only get in each other's way

SHARED = Path(__file__).resolve().parents[2] / "shared"

IMAGE = (40, 56)
GRID = (5, 7)
PATCHES = 35
HEADS = 5
CLASSES = 11

VARIANTS: dict[str, dict[str, Any]] = {
    "class": {},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "registers": {"reg_tokens": 4, "init_values": 0.1},
    "none": {"class_token": False, "global_pool": "avg"},
    "map": {"class_token": False, "global_pool": "map"},
    "avg": {"global_pool": "avg", "fc_norm": True},
    "qk_norm": {"qk_norm": True, "init_values": 0.1, "no_embed_class": True},
    "unbiased": {"qkv_bias": False, "pre_norm": True},
}
PREFIX = {
    "class": 1,
    "distilled": 2,
    "registers": 5,
    "none": 0,
    "map": 0,
    "avg": 1,
    "qk_norm": 1,
    "unbiased": 1,
}


def tiny_vit(variant: str = "class", *, depth: int = 3, seed: int = 0, **overrides: Any) -> VisionTransformer:
    """A float64 ViT of 35 patches in 5 rows, 5 heads and random weights, in eval mode."""
    options: dict[str, Any] = {
        "name": "vit_tiny_patch16_224",
        "img_size": IMAGE,
        "patch_size": 8,
        "embed_dim": 30,
        "num_heads": HEADS,
        "mlp_ratio": 2.2,
        "depth": depth,
        "num_classes": CLASSES,
        **VARIANTS[variant],
        **overrides,
    }
    model = timm.create_model(options.pop("name"), **options)
    randomize_(model, seed)
    return model.double().eval()


@torch.no_grad()
def randomize_(model: nn.Module, seed: int) -> None:
    """Weights strong enough that attention is far from uniform, biases and LayerScales far from trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.copy_(0.6 + 0.2 * noise)
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.dim() > 1 and name.endswith("weight"):
            parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.3 * noise)


def random_images(batch: int = 3, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *IMAGE, generator=generator, dtype=torch.float64).to(dtype)


def shared_path(name: str) -> Path:
    """A file of the shared folder next to the repository; on CI its absence fails, elsewhere it skips."""
    path = SHARED / name
    if path.exists():
        return path
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{path} is missing, and CI=true: the tests on real data must not be skipped")
    pytest.skip(f"{path} is not here")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure must not end up in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def images() -> Tensor:
    return random_images()


@pytest.fixture
def model() -> VisionTransformer:
    return tiny_vit()


@pytest.fixture(params=sorted(VARIANTS))
def any_model(request: pytest.FixtureRequest) -> VisionTransformer:
    """Every kind of head, prefix and block option in turn."""
    return tiny_vit(request.param)


@pytest.fixture(scope="session")
def tiny_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four images each, 64x64, in a tar."""
    path = tmp_path_factory.mktemp("images") / "tiny.tar"
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(path, "w") as archive:
        for label in ("ant", "bee", "cat"):
            for number in range(4):
                pixels = torch.randint(256, (64, 64, 3), generator=generator, dtype=torch.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels.numpy()).save(file, "PNG")
                add_member(archive, f"{label}/{number}.png", file.getvalue())
    return path


def needs(package: str, release: str) -> None:
    """Skip the test that calls this where the package is older than what the test asks of it."""
    found = version(package)
    if Version(found) < Version(release):
        pytest.skip(f"requires {package} >= {release}, {found} is installed")


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
