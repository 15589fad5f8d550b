"""What works with which model: measured on small models with random weights, never written down by hand.

A case names a model of a library. Its architecture is built anew with few and narrow blocks, an 8 x 8 grid (or a
stated one) and ten classes; everything else, the kind of attention, positions, prefix tokens, LayerScale, norms
and pooling, is as in the full model. Tokens, heads and blocks are those of the full model, which is described
without being computed.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cpvit.adapters import UnsupportedModelError, open_host
from cpvit.plan import Plan, PruneConfig
from cpvit.prune import prune_, record
from cpvit.saving import load_pruned, save_pruned
from cpvit.verify import check, relative_error, tolerance, verify

DEPTH, HEADS, GRID, CLASSES = 4, 6, (8, 8), 10
MACS, HEAD_KEEP_RATE = 0.6, 0.5
YES = "yes"
NO_TRANSFORMERS = "skipped: transformers not installed"


@dataclass(frozen=True)
class Case:
    """A model of the support table."""

    name: str
    family: str
    full: Callable[[], nn.Module]
    """The full model; only ever called on the meta device."""
    small: Callable[[], nn.Module]
    """The same architecture, small."""
    arguments: Mapping[str, object] = field(default_factory=dict)
    """What cannot be read off the model (see ``save_pruned``)."""
    needs_transformers: bool = False


@dataclass(frozen=True)
class SupportRow:
    """What was measured for one case. Outcomes are "yes", or "no: " and the reason."""

    family: str
    model: str
    blocks: int = 0
    tokens: int = 0
    heads: int = 0
    error: float = float("nan")
    """Keep-everything error: see ``verify``."""
    tolerance: float = float("nan")
    patches: int = 0
    """Of the small model, which the rest is about."""
    survivors: tuple[int, ...] = ()
    """Patches that left each block, recorded while it ran at 0.6 of the MACs."""
    head_pruning: str = ""
    heads_left: tuple[int, ...] = ()
    compiles: str = ""
    exports: str = ""
    saves: str = ""
    failure: str = ""
    """Why this model fails as a whole; empty if it does not."""

    @property
    def failed(self) -> bool:
        """Whether something that every supported model should do does not work; cut heads are not such."""
        outcomes = (self.compiles, self.exports, self.saves)
        return (bool(self.failure) and self.failure != NO_TRANSFORMERS) or any(
            no != YES for no in outcomes if no
        )


def measure(case: Case, *, seed: int = 0) -> SupportRow:
    """Everything the table says about one model."""
    if case.needs_transformers and importlib.util.find_spec("transformers") is None:
        return SupportRow(case.family, case.name, failure=NO_TRANSFORMERS)
    try:
        return _measured(case, seed)
    except Exception as error:  # the table is about what goes wrong, whatever it is
        return SupportRow(case.family, case.name, failure=_reason(error))


def _measured(case: Case, seed: int) -> SupportRow:
    with torch.device("meta"):
        full = open_host(case.full())
    model = small_model(case, seed)
    checked = verify(model, seed=seed)
    check(model)
    images = random_images(model, 3, seed)
    survivors = measure_survivors(model, images)
    head_pruning, plan = prune_heads(model, images)
    return SupportRow(
        family=case.family,
        model=case.name,
        blocks=full.depth,
        tokens=full.num_tokens,
        heads=full.blocks[0].num_heads,
        error=checked.error,
        tolerance=checked.tolerance,
        patches=plan.num_patches,
        survivors=survivors,
        head_pruning=head_pruning,
        heads_left=plan.heads_per_block,
        compiles=_outcome(check_compile, model, images),
        exports=_outcome(check_export, model, images),
        saves=_outcome(check_saving, model, images, case.arguments),
    )


def small_model(case: Case, seed: int = 0) -> nn.Module:
    """The small model with random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.small()
        randomize_(model)
    return model.eval()


@torch.no_grad()
def randomize_(model: nn.Module) -> None:
    """Weights with which every part matters: LayerScale far from 0, biases and registers far from nothing."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn_like(parameter)
            if "Norm" in type(module).__name__ and name == "weight":
                parameter.copy_(1 + 0.2 * noise)
            elif name.startswith(("gamma", "lambda")):
                parameter.copy_(0.6 + 0.2 * noise)
            elif parameter.dim() > 1 and name.endswith("weight"):
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise)


def random_images(model: nn.Module, batch: int, seed: int = 0) -> Tensor:
    """[B 3 H W] of the model's size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *open_host(model).image_shape, generator=generator)


def measure_survivors(model: nn.Module, images: Tensor) -> tuple[int, ...]:
    """Prune to 0.6 of the MACs, run, and count the patches that leave each block."""
    plan = prune_(model, PruneConfig(macs=MACS), verify=False)
    with record(model) as trace:
        run(model, images)
    counted = tuple(kept.shape[1] for kept in trace.survivors)
    if counted != plan.patches_per_block or counted[-1] >= plan.num_patches:
        raise RuntimeError(
            f"{counted} of {plan.num_patches} patches left the blocks, planned {plan.patches_per_block}"
        )
    return counted


def prune_heads(model: nn.Module, images: Tensor) -> tuple[str, Plan]:
    """Also cut half of the heads where that is possible: outcome, and the plan then in force."""
    try:
        config = PruneConfig(macs=MACS, head_keep_rate=HEAD_KEEP_RATE)
        return YES, prune_(model, config, calibration=images, verify=False)
    except UnsupportedModelError as error:
        return _no(error), prune_(model, PruneConfig(macs=MACS), verify=False)


@torch.inference_mode()
def run(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, or features of a model without a classifier."""
    return open_host(model).output(model(images))


def check_compile(model: nn.Module, images: Tensor) -> None:
    """One graph, and the same output."""
    torch.compiler.reset()
    host, compiled = open_host(model), torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        got = host.output(compiled(images))
    _expect_equal(got, run(model, images), host.depth)


def check_export(model: nn.Module, images: Tensor) -> None:
    """For any number of images, and the same output for another one than it was exported with."""
    host = open_host(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (images[1:],), dynamic_shapes=({0: batch},)).module()
        got = host.output(exported(images))
    _expect_equal(got, run(model, images), host.depth)


def check_saving(model: nn.Module, images: Tensor, arguments: Mapping[str, object]) -> None:
    """Saved, loaded without being told what it is, and the same output bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(model, folder, arguments=arguments)
        again = load_pruned(folder)
    if not torch.equal(run(again, images), run(model, images)):
        raise RuntimeError("the loaded model's output differs")


def _expect_equal(got: Tensor, expected: Tensor, depth: int) -> None:
    error, limit = relative_error(got, expected), tolerance(expected.dtype, depth)
    if error > limit:
        raise RuntimeError(f"the output differs by {error:.1e} (tolerance {limit:.1e})")


def _outcome(attempt: Callable[..., None], *args: object) -> str:
    try:
        attempt(*args)
    except Exception as error:  # the table is about what goes wrong, whatever it is
        return _no(error)
    return YES


def _no(error: Exception) -> str:
    return f"no: {_reason(error)}"


def _reason(error: Exception) -> str:
    """First sentence of the message; the table has no room for more."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition("; ")[0][:200]


def _timm(
    name: str, family: str, *, grid: tuple[int, int] = GRID, note: str = "", **arguments: object
) -> Case:
    full = partial(timm.create_model, name, **arguments)
    return Case(f"{name}{note}", family, full, partial(_small_timm, name, grid, arguments), arguments)


def _small_timm(name: str, grid: tuple[int, int], arguments: Mapping[str, object]) -> nn.Module:
    with torch.device("meta"):
        patch = timm.create_model(name).patch_embed.patch_size
    small: nn.Module = timm.create_model(
        name,
        img_size=(grid[0] * patch[0], grid[1] * patch[1]),
        embed_dim=_width(patch[0]),
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=CLASSES,
        **arguments,
    )
    return small


def _width(patch: int) -> int:
    """Narrower, and cutting the image into patches would cost more than the blocks that are pruned."""
    return 192 if patch >= 32 else 96


def _torchvision(name: str) -> Case:
    return Case(name, "torchvision ViT", partial(_full_torchvision, name), partial(_small_torchvision, name))


def _full_torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None)
    return model


def _small_torchvision(name: str) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    patch = int(name.rpartition("_")[2])
    width = _width(patch)
    model: nn.Module = VisionTransformer(
        GRID[0] * patch, patch, DEPTH, HEADS, width, 4 * width, num_classes=CLASSES
    )
    return model


def _transformers(kind: str, family: str, note: str = "", **values: object) -> Case:
    return Case(
        f"{kind}{note}",
        family,
        partial(_full_transformers, kind, values),
        partial(_small_transformers, kind, values),
        needs_transformers=True,
    )


def _full_transformers(kind: str, values: Mapping[str, object]) -> nn.Module:
    import transformers

    return _from_config(getattr(transformers, kind), values)


def _small_transformers(kind: str, values: Mapping[str, object]) -> nn.Module:
    import transformers

    found: Any = getattr(transformers, kind)
    patch = values.get("patch_size", 16)
    assert isinstance(patch, int)
    small: dict[str, object] = {
        "hidden_size": _width(patch),
        "intermediate_size": 4 * _width(patch),
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": GRID[0] * patch,
        "patch_size": patch,
        "num_labels": CLASSES,
    }
    return _from_config(found, {**values, **small})


def _from_config(kind: Any, values: Mapping[str, object]) -> nn.Module:
    """CLIP and SigLIP classifiers keep the values of the image tower one level down."""
    if kind.__name__ not in ("CLIPForImageClassification", "SiglipForImageClassification"):
        model: nn.Module = kind(kind.config_class(**values))
        return model
    tower = {name: value for name, value in values.items() if name != "num_labels"}
    labels = {"num_labels": values["num_labels"]} if "num_labels" in values else {}
    classifier: nn.Module = kind(kind.config_class(vision_config=tower, text_config=_TEXT, **labels))
    return classifier


_TEXT = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""Of the text towers, which are not part of the classifiers."""


def _family(family: str, names: str) -> tuple[Case, ...]:
    return tuple(_timm(name, family) for name in names.split())


_HF_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_HF_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}

CASES: tuple[Case, ...] = (
    *_family(
        "ViT",
        "vit_tiny_patch16_224 vit_small_patch32_224 vit_base_patch16_224 vit_base_patch8_224 "
        "vit_large_patch16_224 vit_huge_patch14_224 vit_small_patch16_36x1_224",
    ),
    _timm("vit_base_patch16_224", "ViT", grid=(5, 9), note=", image of 5 x 9 patches"),
    _timm("vit_base_patch16_224", "ViT", note=", q/k norm", qk_norm=True),
    *_family("ViT, AugReg", "vit_tiny_patch16_224.augreg_in21k vit_base_patch32_384.augreg_in21k_ft_in1k"),
    *_family("ViT, average pooling", "vit_medium_patch16_gap_240 vit_huge_patch14_gap_224"),
    *_family("ViT, registers", "vit_little_patch16_reg1_gap_256 vit_base_patch16_reg4_gap_256"),
    *_family("ViT, registers and attention pooling", "vit_so150m_patch16_reg4_map_256"),
    *_family("ViT, norm after attention", "vit_base_patch16_rpn_224"),
    *_family("ViT, relative positions", "vit_relpos_small_patch16_224 vit_relpos_base_patch16_cls_224"),
    *_family("ViT, shared relative positions", "vit_srelpos_small_patch16_224"),
    *_family("AIMv2", "aimv2_large_patch14_224"),
    *_family("InternViT", "vit_intern300m_patch14_448"),
    *_family("MAE", "vit_base_patch16_224.mae vit_large_patch16_224.mae vit_huge_patch14_224.mae"),
    *_family("DeiT", "deit_tiny_patch16_224 deit_small_patch16_224 deit_base_patch16_384"),
    *_family("DeiT, distilled", "deit_tiny_distilled_patch16_224 deit_base_distilled_patch16_384"),
    *_family(
        "DeiT-III",
        "deit3_small_patch16_224 deit3_medium_patch16_224 deit3_base_patch16_384 deit3_large_patch16_224 "
        "deit3_huge_patch14_224",
    ),
    *_family(
        "CLIP",
        "vit_base_patch32_clip_224 vit_base_patch16_clip_quickgelu_224 vit_large_patch14_clip_336 "
        "vit_giant_patch14_clip_224",
    ),
    *_family("SigLIP", "vit_base_patch16_siglip_224 vit_so400m_patch14_siglip_384"),
    *_family("SigLIP, average pooling", "vit_base_patch16_siglip_gap_224"),
    *_family("DINOv2", "vit_small_patch14_dinov2 vit_large_patch14_dinov2 vit_giant_patch14_dinov2"),
    *_family("DINOv2, registers", "vit_small_patch14_reg4_dinov2 vit_giant_patch14_reg4_dinov2"),
    *_family("DINOv3", "vit_small_patch16_dinov3 vit_huge_plus_patch16_dinov3 vit_7b_patch16_dinov3"),
    *_family("EVA", "eva_large_patch14_196 eva_giant_patch14_224"),
    *_family("EVA-02", "eva02_tiny_patch14_224 eva02_base_patch14_448 eva02_base_patch16_clip_224"),
    *_family("Perception Encoder", "vit_pe_core_tiny_patch16_384 vit_pe_spatial_base_patch16_512"),
    *_family("ViT, rotary", "vit_base_patch16_rope_224"),
    *_family("ViT, rotary per head", "vit_base_patch16_rope_mixed_224"),
    *_family("BEiT", "beit_base_patch16_224 beit_large_patch16_512"),
    *_family("BEiT v2", "beitv2_base_patch16_224 beitv2_large_patch16_224"),
    *(_torchvision(name) for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")),
    _transformers("ViTForImageClassification", "transformers ViT", ", base"),
    _transformers("ViTForImageClassification", "transformers ViT", ", large", **_HF_LARGE),
    _transformers("ViTModel", "transformers ViT", ", base"),
    _transformers("DeiTForImageClassification", "transformers DeiT", ", small", **_HF_SMALL),
    _transformers("DeiTForImageClassificationWithTeacher", "transformers DeiT", ", base"),
    _transformers("Dinov2Model", "transformers DINOv2", ", small", patch_size=14, **_HF_SMALL),
    _transformers(
        "Dinov2ForImageClassification",
        "transformers DINOv2",
        ", giant",
        patch_size=14,
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        use_swiglu_ffn=True,
    ),
    _transformers(
        "Dinov2WithRegistersModel", "transformers DINOv2, registers", ", small", patch_size=14, **_HF_SMALL
    ),
    _transformers("CLIPVisionModelWithProjection", "transformers CLIP", ", base", patch_size=32),
    _transformers("CLIPForImageClassification", "transformers CLIP", ", large", patch_size=14, **_HF_LARGE),
    _transformers("SiglipVisionModel", "transformers SigLIP", ", base"),
    _transformers("SiglipForImageClassification", "transformers SigLIP", ", large", **_HF_LARGE),
)
"""Every family, at sizes from tiny to huge."""


def representatives(cases: Iterable[Case] = CASES) -> tuple[Case, ...]:
    """The first case of every family."""
    return tuple({case.family: case for case in reversed(tuple(cases))}.values())[::-1]
