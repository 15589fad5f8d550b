"""Load a weights file into a model: strictly, from whatever layout it has, without running code in it.

A file is read (safetensors, torch pickle or npz), its layout is recognised by the names of its tensors, the
tensors are renamed to the model's names, position embeddings are resized to the model's grid, and only when
every tensor has its place is anything written into the model. Nothing is loaded partially.

Files saved by the model itself load into any ``nn.Module``. Foreign layouts load into timm's
``VisionTransformer`` (plain and distilled): the original CP-ViT code's, Google's npz, Hugging Face ViT and
DeiT, DINOv2, CLIP image towers, MAE.

Legend: L blocks, N position tokens (prefix and patches), C channels, H heads, D head dimension.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

Grid: TypeAlias = tuple[int, int]
State: TypeAlias = dict[str, Tensor]
_Renames: TypeAlias = tuple[tuple[re.Pattern[str], str], ...]


class CheckpointError(ValueError):
    """A weights file cannot be loaded; the message names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`load_checkpoint` did."""

    path: Path
    layout: str
    """'timm', 'deit' (timm's names below 'model'), 'seed' (the original CP-ViT code), 'google-npz', 'hf',
    'clip', 'dinov2', 'mae', or 'native' (the names of a model that is not timm's)."""
    entry: str | None = None
    """Where in the file the weights were ('model', 'state_dict_ema', ...); None if they were not nested."""
    pos_embed_resized: tuple[Grid, Grid] | None = None
    """(grid in the file, grid of the model), as (rows, columns); None if nothing was resized."""
    head_replaced: tuple[int, int] | None = None
    """(classes in the file, classes of the model) if the model kept its own head; 0 means no head."""
    ignored: tuple[str, ...] = ()
    """Tensors the model has no place for and does not need, such as a pooler or a mask token."""

    def summary(self) -> str:
        """Say it in one line."""
        parts = [f"{self.path.name}: {self.layout} layout"]
        if self.entry is not None:
            parts.append(f"weights from {self.entry!r}")
        if self.pos_embed_resized is not None:
            old, new = self.pos_embed_resized
            parts.append(f"position embeddings resized {_by(old)} -> {_by(new)}")
        if self.head_replaced is not None:
            parts.append(
                f"head not loaded (file {self.head_replaced[0]} classes, model {self.head_replaced[1]})"
            )
        if self.ignored:
            parts.append(f"ignored {_some(self.ignored)}")
        return "; ".join(parts)


def load_checkpoint(model: nn.Module, path: str | Path, *, replace_head: bool = False) -> CheckpointReport:
    """Load a weights file into ``model``, in place, every tensor or none.

    Position embeddings are resized (bicubic) when the file's grid of patches differs. A file with as many
    positions as the model is taken to have the model's grid. Tensors are cast to the model's dtype.

    Args:
        model: Any module for a file with its own names; a timm ``VisionTransformer`` for foreign layouts.
        path: A ``.safetensors``, ``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.tar`` or ``.npz`` file.
        replace_head: Where the file's head does not fit (other classes, or none), keep the head the model
            has now. A head that fits is always loaded.

    Raises:
        CheckpointError: The file is missing, damaged, needs code to be read, or does not fit the model. The
            model is then unchanged.
        ValueError: The model has parameters on the meta device, which hold nothing.

    Example:
        >>> report = load_checkpoint(model, "deit_tiny_patch16_224.safetensors")  # doctest: +SKIP
        >>> report.summary()  # doctest: +SKIP
        'deit_tiny_patch16_224.safetensors: timm layout'
    """
    own = dict(model.state_dict())
    if any(tensor.is_meta for tensor in own.values() if isinstance(tensor, Tensor)):
        raise ValueError(
            "the model has parameters on the meta device; call model.to_empty(device='cpu') first"
        )
    file = Path(path).expanduser()
    try:
        entry, state = _read(file)
        return _load(model, own, state, file=file, entry=entry, replace_head=replace_head)
    except CheckpointError as error:  # the one place that adds the file's name
        raise CheckpointError(f"{file}: {error}") from error.__cause__
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error


def _load(
    model: nn.Module, own: State, state: State, *, file: Path, entry: str | None, replace_head: bool
) -> CheckpointReport:
    """Convert, fit and check everything; write into the model last."""
    state = _without_wrapper_prefixes(state, own)
    layout = _layout_of(model, state)
    converted = _converted(layout, state)
    ignored = tuple(key for key in converted if key not in own and layout.harmless.search(key))
    body, head = _split_head({key: tensor for key, tensor in converted.items() if key not in ignored})
    own_body, own_head = _split_head(own)

    _check_names(body, own_body, model)
    body, resized = _fit_positions(body, own_body, model)
    _check_tensors(body, own_body)
    follows_pre_logits = any("pre_logits" in key for key in ignored)
    head, replaced = _fit_head(head, own_head, replace=replace_head, follows_pre_logits=follows_pre_logits)
    _check_tensors(head, own_head)

    model.load_state_dict({**body, **head}, strict=True)
    name = "deit" if layout.name == "timm" and entry == "model" else layout.name
    return CheckpointReport(file, name, entry, resized, replaced, ignored)


_HEAD_BIAS = re.compile(r"(^|[./])(head|heads\.head|fc|(cls_)?classifier)[./]bias$")


def head_classes(path: str | Path) -> int | None:
    """Classes of the classification head in a weights file; None if it has none.

    Raises:
        CheckpointError: The file cannot be read.
    """
    file = Path(path).expanduser()
    try:
        _, state = _read(file)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error.__cause__
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    sizes = [
        tensor.shape[0] for name, tensor in state.items() if _HEAD_BIAS.search(name) and tensor.dim() == 1
    ]
    return sizes[0] if sizes else None


# --- reading files --------------------------------------------------------------------------------

_FORMAT_OF_SUFFIX: Mapping[str, str] = {
    ".safetensors": "safetensors",
    ".pth": "torch",
    ".pt": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".tar": "torch",
    ".npz": "npz",
}

# Where training scripts put the weights. Averaged (EMA) weights come first: they are the ones to evaluate.
_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")


def _read(file: Path) -> tuple[str | None, State]:
    """Read a file into (entry that held the weights, its tensors)."""
    _check_is_file(file)
    expected, found = _FORMAT_OF_SUFFIX.get(file.suffix.lower()), _format_of_content(file)
    if expected is None:
        raise CheckpointError(
            f"unknown extension {file.suffix!r}; expected one of {', '.join(_FORMAT_OF_SUFFIX)}"
        )
    if found != expected:
        right = next(suffix for suffix, name in _FORMAT_OF_SUFFIX.items() if name == found)
        raise CheckpointError(
            f"the extension says {expected} but the content is {found}; rename it to *{right}"
        )
    entry, content = _unwrapped(_READERS[found](file))
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(_no_state_dict(content))
    if not content:
        raise CheckpointError("holds no tensors")
    return entry, content


def _check_is_file(file: Path) -> None:
    if file.is_dir():
        inside = sorted(child.name for child in file.iterdir() if child.suffix.lower() in _FORMAT_OF_SUFFIX)
        raise CheckpointError(f"is a folder; give the weights file in it ({_some(inside) or 'it has none'})")
    if not file.exists():
        raise CheckpointError("no such file")
    if file.stat().st_size == 0:
        raise CheckpointError("the file is empty; download it again")


def _format_of_content(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(64)
    # First of all, for the length may begin with the bytes that mark the others.
    if start[8:9] == b"{":  # eight bytes of length, then a JSON header
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return _format_of_zip(file)
    if start[:1] == b"\x80":  # a pickle: how torch saved before 1.6
        return "torch"
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError("is a Git LFS pointer, not the weights; run `git lfs pull`")
    raise CheckpointError(
        f"is not a weights file (it starts with {start[:12]!r}); expected safetensors, torch or npz"
    )


def _format_of_zip(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"is truncated or damaged ({error}); download it again") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            "is a TorchScript program, which holds code; save its state_dict() as safetensors"
        )
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    raise CheckpointError(f"is a zip archive without weights (it holds {_some(names) or 'nothing'})")


def _read_safetensors(file: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(error) from error


def _read_torch(file: Path) -> object:
    try:
        # torch warns about pickle protocols it rarely sees; what it cannot read, it refuses below.
        with warnings.catch_warnings(), _namespaces_allowed():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None:
            raise CheckpointError(
                f"is damaged, or not written by torch.save ({_reason(error)}); nothing in it was run"
            ) from None
        raise CheckpointError(
            f"needs arbitrary unpickling (it contains {name[1]}), which can run code, and was not read; "
            "save its state_dict() as safetensors on a machine that trusts it"
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _damaged(error) from error


def _namespaces_allowed() -> AbstractContextManager[object]:
    """Let training scripts' ``args`` pass: a Namespace only holds values, building one runs no code."""
    # torch 2.4 cannot allow a class for one call only; there such files are refused.
    allowed = getattr(torch.serialization, "safe_globals", None)
    return nullcontext() if allowed is None else allowed([argparse.Namespace])


def _read_npz(file: Path) -> object:
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as archive:
            return {key: torch.from_numpy(archive[key]) for key in archive.files}
    except Exception as error:  # zlib, zip, header and dtype errors all differ
        raise _damaged(error) from error


_READERS: Mapping[str, Callable[[Path], object]] = {
    "safetensors": _read_safetensors,
    "torch": _read_torch,
    "npz": _read_npz,
}


def _damaged(error: Exception) -> CheckpointError:
    return CheckpointError(f"is truncated, damaged or not supported ({_reason(error)}); download it again")


def _reason(error: Exception) -> str:
    """Torch's messages run to paragraphs; the sentence that tells what happened is enough."""
    text = re.sub(r"(?s).*WeightsUnpickler error:", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0]


def _unwrapped(content: object) -> tuple[str | None, dict[str, Tensor]]:
    """Find the state dict in what was read. Its values are checked by the caller."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"holds a {type(content).__name__}; expected a dict of tensors (a state_dict)")
    for entry in _ENTRIES:
        if isinstance(content.get(entry), Mapping):
            return entry, dict(content[entry])
    return None, dict(content)


def _no_state_dict(content: Mapping[str, object]) -> str:
    others = [
        f"{key} ({type(value).__name__})" for key, value in content.items() if not isinstance(value, Tensor)
    ]
    return f"holds no state_dict but {_some(others)}; expected tensors, or an entry {' or '.join(_ENTRIES)}"


def _without_wrapper_prefixes(state: State, own: State) -> State:
    """Drop what DistributedDataParallel and torch.compile put before every name."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if state.keys() != own.keys() and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


# --- layouts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How one family of files names its tensors, and how to give them timm's names."""

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


_SEED_BLOCK = r"^transformer\.encoder\.layer\.(\d+)\."
_SEED_NAMES = _table(
    (r"^transformer\.embeddings\.cls_token$", "cls_token"),
    (r"^transformer\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^transformer\.embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^transformer\.encoder\.encoder_norm\.", "norm."),
    (_SEED_BLOCK + r"attention_norm\.", r"blocks.\1.norm1."),
    (_SEED_BLOCK + r"ffn_norm\.", r"blocks.\1.norm2."),
    (_SEED_BLOCK + r"attn\.([qkv])(?:uery|ey|alue)\.", r"blocks.\1.attn.\2."),
    (_SEED_BLOCK + r"attn\.out\.", r"blocks.\1.attn.proj."),
    (_SEED_BLOCK + r"ffn\.", r"blocks.\1.mlp."),
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

_CLIP_BLOCK = r"^visual\.transformer\.resblocks\.(\d+)\."
_CLIP_NAMES = _table(
    (r"^visual\.class_embedding$", "cls_token"),
    (r"^visual\.positional_embedding$", "pos_embed"),
    (r"^visual\.conv1\.", "patch_embed.proj."),
    (r"^visual\.ln_pre\.", "norm_pre."),
    (r"^visual\.ln_post\.", "norm."),
    (r"^visual\.proj$", "head.weight"),
    (_CLIP_BLOCK + r"ln_([12])\.", r"blocks.\1.norm\2."),
    (_CLIP_BLOCK + r"attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (_CLIP_BLOCK + r"attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (_CLIP_BLOCK + r"mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (_CLIP_BLOCK + r"mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
)

_DINOV2_NAMES = _table((r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))
# DeiT III names its LayerScale as a parameter of the block.
_TIMM_NAMES = _table((r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"))


def _from_seed(state: State) -> State:
    return _fused_qkv(_renamed(state, _SEED_NAMES))


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
    """The image tower; its projection becomes a head without bias."""
    out = _renamed(state, _CLIP_NAMES)
    for key in ("cls_token", "pos_embed"):
        if key in out:
            out[key] = out[key].reshape(1, -1, out[key].shape[-1])
    if "head.weight" in out:
        out["head.weight"] = out["head.weight"].transpose(0, 1)
        out["head.bias"] = out["head.weight"].new_zeros(out["head.weight"].shape[0])
    return out


def _from_dinov2(state: State) -> State:
    """With registers, timm's class token has no position of its own, so it is added to the token."""
    out = _renamed(state, _DINOV2_NAMES)
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


_NEVER = re.compile(r"(?!)")
_NATIVE = _Layout("native", _NEVER, dict, _NEVER)
_TIMM_NATIVE = _Layout("timm", _NEVER, dict, _NEVER)  # EVA, Swin, ...: only their own names
_LAYOUTS = (
    _Layout("seed", re.compile(r"^transformer\.embeddings\.cls_token$"), _from_seed, _NEVER),
    _Layout("google-npz", re.compile(r"(?:^|/)embedding/kernel$"), _from_google, re.compile(r"^pre_logits/")),
    _Layout(
        "hf",
        re.compile(_HF + r"embeddings\.patch_embeddings\.projection\.weight$"),
        _from_hf,
        re.compile(_HF + r"(?:pooler\.|embeddings\.mask_token$|decoder\.)"),
    ),
    _Layout(
        "clip",
        re.compile(r"^visual\.class_embedding$"),
        _from_clip,
        re.compile(
            r"^(?:transformer\.|token_embedding\.|ln_final\.|positional_embedding$|text_projection$|logit_scale$)"
        ),
    ),
    _Layout("mae", re.compile(r"^decoder_embed\."), _from_timm, re.compile(r"^(?:decoder_|mask_token$)")),
    _Layout(
        "dinov2", re.compile(r"^(?:mask_token|register_tokens)$"), _from_dinov2, re.compile(r"^mask_token$")
    ),
    _Layout("timm", re.compile(r"^patch_embed\.proj\.weight$"), _from_timm, re.compile(r"^pre_logits\.")),
)


def _layout_of(model: nn.Module, state: State) -> _Layout:
    if not _is_timm_vit(model):
        return _TIMM_NATIVE if type(model).__module__.startswith("timm.") else _NATIVE
    for layout in _LAYOUTS:
        if any(layout.marker.search(key) for key in state):
            return layout
    known = ", ".join(layout.name for layout in _LAYOUTS)
    raise CheckpointError(f"has tensor names of no known layout ({_some(state)}); known are {known}")


def _is_timm_vit(model: nn.Module) -> bool:
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model, VisionTransformer)


def _converted(layout: _Layout, state: State) -> State:
    try:
        return layout.convert(state)
    except (RuntimeError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"looks like the {layout.name} layout, but its tensors do not fit it ({error})"
        ) from error


# --- fitting the model ----------------------------------------------------------------------------

_HEADS = (
    "head",
    "head_dist",
    "head.fc",
    "heads.head",
    "classifier",
    "cls_classifier",
    "distillation_classifier",
)


def _split_head(state: State) -> tuple[State, State]:
    """(body, classification heads)."""
    head = {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] in _HEADS}
    return {key: tensor for key, tensor in state.items() if key not in head}, head


def _check_names(body: State, own: State, model: nn.Module) -> None:
    missing = [key for key in own if key not in body]
    unexpected = [key for key in body if key not in own]
    if not missing and not unexpected:
        return
    found = "; ".join(
        f"{what} {len(keys)} ({_some(keys)})"
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    )
    raise CheckpointError(f"does not fit {type(model).__name__}: {found}; {_advice(body, own, model)}")


def _advice(body: State, own: State, model: nn.Module) -> str:
    if not _is_timm_vit(model):
        return "give a file with the model's own names; foreign ones load only into a timm VisionTransformer"
    if "dist_token" in body and "dist_token" not in own:
        return "the file is of a distilled model; create one whose name has 'distilled'"
    if "dist_token" in own and "dist_token" not in body:
        return "the model is distilled and the file is not; create the model without 'distilled' in its name"
    return _comparison(body, own)


def _comparison(body: State, own: State) -> str:
    advice = "create the model that the file was saved from"
    if not _has_patches(body) or not _has_patches(own):
        return advice
    return f"the file has {_described(body)}, the model {_described(own)}; {advice}"


def _has_patches(state: State) -> bool:
    kernel = state.get("patch_embed.proj.weight")
    return kernel is not None and kernel.ndim == 4


def _described(state: State) -> str:
    blocks = {match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    kernel = state["patch_embed.proj.weight"]
    return f"{len(blocks)} blocks, width {kernel.shape[0]}, patch {_by(kernel.shape[2:])}"


def _check_tensors(tensors: State, own: State) -> None:
    """Shapes and kinds of number, once the names agree."""
    wrong = [key for key, tensor in tensors.items() if tensor.shape != own[key].shape]
    if wrong:
        details = [f"{key} is {_by(tensors[key].shape)}, expected {_by(own[key].shape)}" for key in wrong]
        raise CheckpointError(f"shapes differ: {_some(details)}; {_comparison(tensors, own)}")
    for key, tensor in tensors.items():
        kind, expected = tensor.dtype, own[key].dtype
        if kind.is_floating_point != expected.is_floating_point or kind.is_complex != expected.is_complex:
            raise CheckpointError(f"{key} is {kind}, expected {expected}; convert the file first")


def _fit_head(
    head: State, own: State, *, replace: bool, follows_pre_logits: bool
) -> tuple[State, tuple[int, int] | None]:
    """The head to load, and (classes in the file, in the model) if that is the model's own."""
    fits = _shapes(head) == _shapes(own)
    # A head trained behind the pre_logits layer means nothing without it.
    if fits and not (follows_pre_logits and own):
        return head, None
    old, new = _classes(head), _classes(own)
    if replace:
        return own, (old, new)
    keep = "pass replace_head=True to keep the head the model has now"
    if fits:
        raise CheckpointError(f"its head reads a pre_logits layer, which the model lacks; {keep}")
    if old == new:
        raise CheckpointError(f"its head is {_listed(head)}, expected {_listed(own)}; {keep}")
    raise CheckpointError(
        f"has {_head_of(old)}, expected {_head_of(new)}; create the model with num_classes={old}, or {keep}"
    )


def _head_of(classes: int) -> str:
    return f"a head of {classes} classes" if classes else "no head"


def _shapes(state: State) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}


def _classes(head: State) -> int:
    return next((tensor.shape[0] for key, tensor in head.items() if key.endswith("weight")), 0)


def _listed(head: State) -> str:
    return ", ".join(f"{key} {_by(tensor.shape)}" for key, tensor in sorted(head.items()))


def _fit_positions(body: State, own: State, model: nn.Module) -> tuple[State, tuple[Grid, Grid] | None]:
    """Resize absolute position embeddings [1 N C] to the model's grid; prefix tokens keep theirs."""
    old, target = body.get("pos_embed"), own.get("pos_embed")
    new_grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if old is None or target is None or new_grid is None or old.shape == target.shape:
        return body, None
    if old.ndim != 3 or target.ndim != 3 or old.shape[::2] != target.shape[::2]:
        return body, None  # another width: reported with the other shapes

    from timm.layers import resample_abs_pos_embed

    prefix = target.shape[1] - math.prod(new_grid)
    old_grid = _grid_of(old.shape[1] - prefix, new_grid, prefix)
    resized = resample_abs_pos_embed(
        old.float(), new_size=list(new_grid), old_size=list(old_grid), num_prefix_tokens=prefix
    )
    return {**body, "pos_embed": resized}, (old_grid, (new_grid[0], new_grid[1]))


def _grid_of(patches: int, new_grid: Grid, prefix: int) -> Grid:
    """Square if it can be, else of the model's aspect ratio: the file does not say."""
    for ratio in (1.0, new_grid[0] / new_grid[1]):
        rows = max(1, round(math.sqrt(max(patches, 1) * ratio)))
        columns = round(rows / ratio)
        if rows * columns == patches:
            return rows, columns
    raise CheckpointError(
        f"its {patches + prefix} position embeddings are no grid of patches after {prefix} prefix tokens, "
        f"neither square nor shaped like the model's {_by(new_grid)}; create it with the file's image size"
    )


def _by(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes)) or "a scalar"


def _some(names: Iterable[str], limit: int = 3) -> str:
    listed = [str(name) for name in names]
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
