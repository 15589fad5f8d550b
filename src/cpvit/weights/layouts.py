"""How families of weights files name their tensors, and the conversion to timm's names.

Files saved by the model itself load into any ``nn.Module``. Foreign layouts load into timm's
``VisionTransformer`` (plain and distilled): the original CP-ViT code's, Google's npz, Hugging Face ViT and
DeiT, DINOv2, CLIP image towers, MAE. timm converts CLIP and DINOv2. Its ``checkpoint_filter_fn`` around these
converters is not used: it resizes patch and position embeddings without a word, and drops pre_logits.
Its npz reader is not used either: it writes into the model while it reads, and skips a head that does not fit.

Legend: L blocks, C channels, H heads, D head dimension.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from cpvit.weights.reading import CheckpointError, State, some

_Renames: TypeAlias = tuple[tuple[re.Pattern[str], str], ...]


@dataclass(frozen=True)
class Layout:
    """How one family of files names its tensors, and the conversion to timm's names."""

    name: str
    marker: re.Pattern[str]
    """A file in which any tensor name matches has this layout."""
    convert: Callable[[State], State]
    harmless: re.Pattern[str]
    """Converted names the model may lack without any loss."""


def _table(*renames: tuple[str, str]) -> _Renames:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in renames)


def _renamed(state: State, table: _Renames) -> State:
    """Rename by the first pattern that matches; other names stay, to be reported as unexpected."""
    out: State = {}
    for key, tensor in state.items():
        name = next((pattern.sub(new, key) for pattern, new in table if pattern.search(key)), key)
        if name in out:
            raise CheckpointError(f"has two tensors for {name}; {key} is one of them")
        out[name] = tensor
    return out


def _fused_qkv(state: State) -> State:
    """Stack query, key, value [C C] of each block to timm's qkv [3C C]."""
    out = dict(state)
    for key in state:
        match = re.fullmatch(r"(blocks\.\d+\.attn)\.q\.(weight|bias)", key)
        if match is None:
            continue
        parts = [f"{match[1]}.{part}.{match[2]}" for part in "qkv"]
        if all(part in state for part in parts):
            out[f"{match[1]}.qkv.{match[2]}"] = torch.cat([out.pop(part) for part in parts])
    return out


_ORIGINAL_BLOCK = r"^transformer\.encoder\.layer\.(\d+)\."
_ORIGINAL_NAMES = _table(
    (r"^transformer\.embeddings\.cls_token$", "cls_token"),
    (r"^transformer\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^transformer\.embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^transformer\.encoder\.encoder_norm\.", "norm."),
    (_ORIGINAL_BLOCK + r"attention_norm\.", r"blocks.\1.norm1."),
    (_ORIGINAL_BLOCK + r"ffn_norm\.", r"blocks.\1.norm2."),
    (_ORIGINAL_BLOCK + r"attn\.([qkv])(?:uery|ey|alue)\.", r"blocks.\1.attn.\2."),
    (_ORIGINAL_BLOCK + r"attn\.out\.", r"blocks.\1.attn.proj."),
    (_ORIGINAL_BLOCK + r"ffn\.", r"blocks.\1.mlp."),
)

# transformers 4 wrote encoder.layer.0.attention.attention.query (as does save_pretrained of 5); in memory,
# transformers 5 says layers.0.attention.q_proj. Models without a head drop the vit. or deit. prefix.
_HF = r"^(?:vit\.|deit\.)?"
_HF_BLOCK = _HF + r"(?:encoder\.layer|layers)\.(\d+)\."
_HF_NAMES = _table(
    (_HF + r"embeddings\.cls_token$", "cls_token"),
    (_HF + r"embeddings\.distillation_token$", "dist_token"),
    (_HF + r"embeddings\.position_embeddings$", "pos_embed"),
    (_HF + r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (_HF + r"layernorm\.", "norm."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
    (_HF_BLOCK + r"layernorm_before\.", r"blocks.\1.norm1."),
    (_HF_BLOCK + r"layernorm_after\.", r"blocks.\1.norm2."),
    (_HF_BLOCK + r"attention\.attention\.([qkv])(?:uery|ey|alue)\.", r"blocks.\1.attn.\2."),
    (_HF_BLOCK + r"attention\.([qkv])_proj\.", r"blocks.\1.attn.\2."),
    (_HF_BLOCK + r"attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (_HF_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (_HF_BLOCK + r"(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
)

_GOOGLE_BLOCK = r"^Transformer/encoderblock_(\d+)/"
_GOOGLE_NAMES = _table(
    (r"^cls$", "cls_token"),
    (r"^(?:Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"^embedding/(weight|bias)$", r"patch_embed.proj.\1"),
    (r"^Transformer/encoder_norm/(weight|bias)$", r"norm.\1"),
    (r"^head/(weight|bias)$", r"head.\1"),
    (_GOOGLE_BLOCK + r"LayerNorm_0/", r"blocks.\1.norm1."),
    (_GOOGLE_BLOCK + r"LayerNorm_[12]/", r"blocks.\1.norm2."),
    (_GOOGLE_BLOCK + r"MultiHeadDotProductAttention_\d/([qkv])(?:uery|ey|alue)/", r"blocks.\1.attn.\2."),
    (_GOOGLE_BLOCK + r"MultiHeadDotProductAttention_\d/out/", r"blocks.\1.attn.proj."),
    (_GOOGLE_BLOCK + r"MlpBlock_\d/Dense_0/", r"blocks.\1.mlp.fc1."),
    (_GOOGLE_BLOCK + r"MlpBlock_\d/Dense_1/", r"blocks.\1.mlp.fc2."),
)

# DeiT III names its LayerScale as a parameter of the block.
_TIMM_NAMES = _table((r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"))


def _from_original(state: State) -> State:
    return _fused_qkv(_renamed(state, _ORIGINAL_NAMES))


def _from_hf(state: State) -> State:
    return _fused_qkv(_renamed(state, _HF_NAMES))


def _from_timm(state: State) -> State:
    return _renamed(state, _TIMM_NAMES)


def _from_google(state: State) -> State:
    """Flax names and axis orders to timm's; the names may sit below a prefix such as ``params/``."""
    prefix = next(key for key in state if key.endswith("embedding/kernel")).removesuffix("embedding/kernel")
    plain = _unstacked({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    ordered = {re.sub(r"/(kernel|scale)$", "/weight", key): _torch_order(key, t) for key, t in plain.items()}
    return _fused_qkv(_renamed(ordered, _GOOGLE_NAMES))


def _unstacked(state: State) -> State:
    """Split blocks that were saved as one scanned layer, [L ...] -> L tensors [...]."""
    out: State = {}
    for key, tensor in state.items():
        if not key.startswith("Transformer/encoderblock/"):
            out[key] = tensor
            continue
        for index, layer in enumerate(tensor):
            out[key.replace("/encoderblock/", f"/encoderblock_{index}/")] = layer
    return out


def _torch_order(key: str, tensor: Tensor) -> Tensor:
    """Flax puts inputs first and gives heads an axis of their own; torch has [out in] and no such axis."""
    if not key.endswith("/kernel"):
        return tensor.flatten() if key.endswith("/bias") else tensor
    if key == "embedding/kernel":
        return tensor.permute(3, 2, 0, 1)
    if key.endswith("/out/kernel"):
        return tensor.flatten(0, 1).transpose(0, 1)  # [H D C] -> [C HD]
    return tensor.flatten(1).transpose(0, 1)  # [C H D] -> [HD C], and [in out] -> [out in]


def _from_clip(state: State) -> State:
    """The image tower, by timm's converter; its projection becomes a head without bias."""
    from timm.models.vision_transformer import _convert_openai_clip

    # timm drops what is not of the image tower; here it stays, so that it is reported as unexpected.
    others = {key: tensor for key, tensor in state.items() if not key.startswith("visual.")}
    return {**others, **_convert_openai_clip(state, None)}


def _from_dinov2(state: State) -> State:
    """By timm's converter. With registers, timm adds the class token's position to the token."""
    from timm.models.vision_transformer import _convert_dinov2

    kept = {
        key: tensor for key, tensor in state.items() if key == "mask_token"
    }  # dropped by timm; reported here
    return {**kept, **_convert_dinov2(dict(state), None)}


_NEVER = re.compile(r"(?!)")
_NATIVE = Layout("native", _NEVER, dict, _NEVER)
_TIMM_NATIVE = Layout("timm", _NEVER, dict, _NEVER)  # EVA, Swin, ...: only their own names
_LAYOUTS = (
    Layout("seed", re.compile(r"^transformer\.embeddings\.cls_token$"), _from_original, _NEVER),
    Layout("google-npz", re.compile(r"(?:^|/)embedding/kernel$"), _from_google, re.compile(r"^pre_logits/")),
    Layout(
        "hf",
        re.compile(_HF + r"embeddings\.patch_embeddings\.projection\.weight$"),
        _from_hf,
        re.compile(_HF + r"(?:pooler\.|embeddings\.mask_token$|decoder\.)"),
    ),
    Layout(
        "clip",
        re.compile(r"^visual\.class_embedding$"),
        _from_clip,
        re.compile(
            r"^(?:transformer\.|token_embedding\.|ln_final\.|positional_embedding$|text_projection$|logit_scale$)"
        ),
    ),
    Layout("mae", re.compile(r"^decoder_embed\."), _from_timm, re.compile(r"^(?:decoder_|mask_token$)")),
    Layout(
        "dinov2", re.compile(r"^(?:mask_token|register_tokens)$"), _from_dinov2, re.compile(r"^mask_token$")
    ),
    Layout("timm", re.compile(r"^patch_embed\.proj\.weight$"), _from_timm, re.compile(r"^pre_logits\.")),
)


def layout_of(model: nn.Module, state: State) -> Layout:
    if not is_timm_vit(model):
        return _TIMM_NATIVE if type(model).__module__.startswith("timm.") else _NATIVE
    for layout in _LAYOUTS:
        if any(layout.marker.search(key) for key in state):
            return layout
    known = ", ".join(layout.name for layout in _LAYOUTS)
    raise CheckpointError(f"has tensor names of no known layout ({some(state)}); known are {known}")


def is_timm_vit(model: nn.Module) -> bool:
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model, VisionTransformer)


def convert(layout: Layout, state: State) -> State:
    try:
        return layout.convert(state)
    except (RuntimeError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"looks like the {layout.name} layout, but its tensors do not fit it ({error})"
        ) from error


def without_wrapper_prefixes(state: State, own: State) -> State:
    """Drop what DistributedDataParallel and torch.compile put before every name."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if state.keys() != own.keys() and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state
