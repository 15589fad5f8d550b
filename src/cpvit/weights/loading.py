"""Load a weights file into a model: every tensor or none.

Position embeddings are resized to the model's grid and the head is fitted; the model is written to only after
names, shapes and dtypes of all tensors were checked.

Legend: N position tokens (prefix and patches), C channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from cpvit.weights.layouts import convert, is_timm_vit, layout_of, without_wrapper_prefixes
from cpvit.weights.reading import CheckpointError, State, errors_naming, read, some

Grid: TypeAlias = tuple[int, int]


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
        """One line."""
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
            parts.append(f"ignored {some(self.ignored)}")
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
    with errors_naming(file):
        entry, state = read(file)
        return _load(model, own, state, file=file, entry=entry, replace_head=replace_head)


def _load(
    model: nn.Module, own: State, state: State, *, file: Path, entry: str | None, replace_head: bool
) -> CheckpointReport:
    """Convert, fit and check everything; write into the model last."""
    state = without_wrapper_prefixes(state, own)
    layout = layout_of(model, state)
    converted = convert(layout, state)
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
        f"{what} {len(keys)} ({some(keys)})"
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    )
    raise CheckpointError(f"does not fit {type(model).__name__}: {found}; {_advice(body, own, model)}")


def _advice(body: State, own: State, model: nn.Module) -> str:
    if not is_timm_vit(model):
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
        raise CheckpointError(f"shapes differ: {some(details)}; {_comparison(tensors, own)}")
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
