"""Why a model that is not a plain Vision Transformer cannot be pruned, by the name of its class.

The name is enough: these families are spelled alike in timm, torchvision and transformers (SwinTransformer,
SwinForImageClassification ...). A name that is not listed gets the general reason.
"""

from __future__ import annotations

from torch import nn

GENERAL = "cpvit needs a plain Vision Transformer, one sequence of tokens through blocks of attention and MLP"
CUSTOM = "its attention is of its own kind, so that its scores do not say how much a patch is needed"

REASONS: tuple[tuple[str, str], ...] = (
    (
        "Swin Swinv2 DonutSwin MaskFormerSwin GlobalContextVit DaVit TinyVit Twins Nest MaxVit MaxxVit "
        "HieraDet Dinat Nat",
        "it attends inside windows of the full patch grid and merges patches between stages",
    ),
    (
        "Hiera MultiScaleVit MViT Mvit PyramidVisionTransformer Pvt PoolingVisionTransformer Segformer Glpn",
        "it pools or merges its patches between stages, which needs every patch in its place",
    ),
    (
        "ConvNeXt ConvNext ConvMixer MetaNeXt ResNet ModifiedResNet RegNet EfficientNet MobileNet ByobNet DenseNet VGG "
        "RepVit FocalNet PoolFormer FastVit EdgeNeXt EfficientFormer SwiftFormer MetaFormer IFormer",
        "it convolves (or pools) over the full patch grid, where no patch can be left out",
    ),
    (
        "CoaT Cvt Visformer MobileVit MobileViT EfficientVit NextViT SHViT",
        "it is a hybrid of attention and convolutions, which need every patch of the grid in its place",
    ),
    (
        "Levit",
        "it is a hybrid that shrinks its patch grid between stages, with attention biases for each grid",
    ),
    ("ConViT ConVit", f"{CUSTOM} (gated positional self-attention)"),
    ("Cait", f"{CUSTOM} (talking heads, and class attention that reads the patches only at the end)"),
    ("Xcit", f"{CUSTOM} (attention between channels, not between patches)"),
    ("VOLO", f"{CUSTOM} (outlook attention on the full patch grid)"),
    ("MlpMixer", "it has no attention, and mixes a fixed number of patches"),
    ("TNT", "each of its patches is itself a sequence, in a second transformer"),
    ("CrossVit", "it runs two sequences of patches of different sizes side by side"),
    (
        "VisionTransformerSAM Sam VitDet",
        "it attends inside windows of the full patch grid, and returns that grid",
    ),
    (
        "Gemma4Vision",
        "it takes patches with masks and coordinates of several image sizes, not one grid of patches",
    ),
    ("Qwen Deepseek", "it returns, or merges, the full patch grid, which needs every patch in its place"),
    (
        "FeatureListNet FeatureDictNet FeatureHookNet FeatureGetterNet FeatureGraphNet",
        "it returns the full patch grid of inner blocks, where patches may have left",
    ),
    ("DataParallel DistributedDataParallel", "it is a wrapper; prune the model inside it (model.module)"),
    ("OptimizedModule", "it is compiled already; prune the model inside it (model._orig_mod), then compile"),
    (
        "ScriptModule RecursiveScriptModule GraphModule",
        "it is a traced graph; prune the model before tracing",
    ),
)
"""Beginnings of class names -> why models of these classes cannot be pruned."""


def refusal(model: nn.Module) -> str:
    """Why a model that no adapter opens cannot be pruned."""
    for kind in type(model).__mro__:
        for names, reason in REASONS:
            if any(_is_family(kind.__name__, name) for name in names.split()):
                return reason
    return GENERAL


def _is_family(name: str, beginning: str) -> bool:
    """Whether a class belongs to a family: SamModel to Sam, Sampler not."""
    rest = name[len(beginning) :]
    return name.startswith(beginning) and not rest[:1].islower()
