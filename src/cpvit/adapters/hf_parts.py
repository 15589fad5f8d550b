"""What a layer of Hugging Face transformers is made of, found by the names of its parts.

transformers writes its encoders alike: norm, attention, residual, norm, MLP, residual, with a LayerScale and a
dropout here and there. The parts are recognised by name, and every part must be: a layer with a module or a
parameter of another name is refused, because only its own forward knows what it does with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from cpvit.adapters.host import UnsupportedModelError

Path: TypeAlias = tuple[str, ...]
"""Attribute names, from a module down to one of its parts; () is the module itself."""

NORM1 = ("layernorm_before", "layer_norm1", "norm1", "rms_norm1", "attention_norm", "input_layernorm")
NORM2 = ("layernorm_after", "layer_norm2", "norm2", "rms_norm2", "ffn_norm", "post_attention_layernorm")
ATTENTION = ("attention", "self_attn", "attn")
INNER_ATTENTION = ("attention", "self")
MLP = ("mlp", "ffn", "feed_forward")
SCALE1 = ("layer_scale1", "lambda_1", "gamma_1")
SCALE2 = ("layer_scale2", "lambda_2", "gamma_2")
DROP_PATH1 = ("drop_path", "drop_path1")
DROP_PATH2 = ("drop_path", "drop_path2")
SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
FUSED = ("qkv",)
PROJECTION = ("o_proj", "out_proj", "projection_layer", "projection", "proj", "dense")
PROJECTION_DROPOUT = ("projection_dropout",)
POSITION_BIAS = "relative_position_bias"
QK_NORM = ("q_norm", "k_norm")
HEADS = ("num_attention_heads", "num_heads")
SCALE = ("scaling", "scale")
PROBABILITY_DROPOUT = ("attention_dropout", "dropout", "dropout_prob")


class LayerParts(NamedTuple):
    """Where the parts of a layer are, as paths from the layer."""

    norm1: Path
    attention: Path
    """The module with the projections of query, key and value."""
    inputs: tuple[str, ...]
    """Their names: three, or one that is fused."""
    qk_norm: tuple[str, ...]
    """Names of the norms of query and key, or ()."""
    projection: Path
    after_attention: tuple[Path, ...]
    """What is applied between the projection and the residual, in order: modules, or factors."""
    norm2: Path
    mlp: tuple[Path, ...]
    after_mlp: tuple[Path, ...]
    bias: Path | None
    """The module with the relative positions, if there is one."""
    heads: str
    """Attribute of the attention: number of heads; likewise the next two, "" if there is none."""
    scale: str
    dropout: str


def part(module: Any, path: Path) -> Any:
    """What lies at a path, looked up now: a part may have been replaced (LoRA) since the model was opened."""
    for name in path:
        module = getattr(module, name)
    return module


def is_layer(module: nn.Module) -> bool:
    """Whether a module has an attention and a norm before it, whatever else it has."""
    return _first(module, ATTENTION) is not None and _first(module, NORM1) is not None


def layer_parts(layer: nn.Module) -> LayerParts:
    """The parts of a layer.

    Raises:
        UnsupportedModelError: One is missing, or there is one that is not known.
    """
    outer = _required(layer, ATTENTION, "attention")
    attention = getattr(layer, outer)
    inner = _first(attention, INNER_ATTENTION)
    path = (outer,) if inner is None else (outer, inner)
    projecting = part(layer, path)
    inputs = _inputs(projecting)
    projection = (*path, _required(projecting, PROJECTION, "output projection")) if inner is None else None
    after = [(*path, name) for name in PROJECTION_DROPOUT if _has(projecting, name)]
    if projection is None:
        projection, after = _output(attention, (outer,))
    mlp, after_mlp = _mlp(layer)
    # With a dropout of its own behind the projection, the attention does not pass through the layer's.
    shared: list[Path] = [("dropout",)] if _has(layer, "dropout") else []
    after = after or shared
    after_mlp = after_mlp or shared
    bias = next(
        (at for at in ((POSITION_BIAS,), (*path, POSITION_BIAS)) if _has(part(layer, at[:-1]), at[-1])), None
    )
    parts = LayerParts(
        norm1=(_required(layer, NORM1, "norm before the attention"),),
        attention=path,
        inputs=inputs,
        qk_norm=QK_NORM if all(_has(projecting, name) for name in QK_NORM) else (),
        projection=projection,
        after_attention=(*after, *_paths(layer, (*SCALE1, *DROP_PATH1))),
        norm2=(_required(layer, NORM2, "norm before the MLP"),),
        mlp=mlp,
        after_mlp=(*after_mlp, *_paths(layer, (*SCALE2, *DROP_PATH2))),
        bias=bias,
        heads=_attribute(projecting, HEADS),
        scale=_attribute(projecting, SCALE),
        dropout=_attribute(projecting, PROBABILITY_DROPOUT),
    )
    _check_complete(layer, parts)
    _check_attention(layer, parts)
    return parts


def _has(module: Any, name: str) -> bool:
    return getattr(module, name, None) is not None


def _first(module: nn.Module, names: Sequence[str]) -> str | None:
    """The first of the names under which there is a module."""
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def _required(module: nn.Module, names: Sequence[str], what: str) -> str:
    found = _first(module, names)
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no {what} that cpvit knows ({', '.join(names)})"
        )
    return found


def _attribute(module: nn.Module, names: Sequence[str]) -> str:
    return next((name for name in names if _has(module, name)), "")


def _inputs(attention: nn.Module) -> tuple[str, ...]:
    for names in (*SEPARATE, FUSED):
        if all(_has(attention, name) for name in names):
            return names
    raise UnsupportedModelError(
        f"{type(attention).__name__} has no projections of query, key and value that cpvit knows "
        f"({', '.join('/'.join(names) for names in (*SEPARATE, FUSED))})"
    )


def _output(module: Any, path: Path) -> tuple[Path, list[Path]]:
    """A dense layer and its dropout, in a module of their own."""
    if not (_has(module, "output") and _has(module.output, "dense")):
        raise UnsupportedModelError(f"{type(module).__name__} has no output.dense")
    dropout = [(*path, "output", "dropout")] if _has(module.output, "dropout") else []
    return (*path, "output", "dense"), dropout


def _mlp(layer: nn.Module) -> tuple[tuple[Path, ...], list[Path]]:
    """One module, or the pair of modules of the older layers, whose second may hold the residual."""
    single = _first(layer, MLP)
    if single is not None:
        return ((single,),), []
    _required(layer, ("intermediate",), "MLP")
    dense, dropout = _output(layer, ())
    return (("intermediate",), dense), dropout


def _paths(layer: nn.Module, names: Sequence[str]) -> list[Path]:
    return [(name,) for name in names if _has(layer, name)]


def _known(parts: LayerParts) -> set[Path]:
    attention = parts.attention
    known = {parts.norm1, parts.norm2, parts.projection, *parts.mlp, *parts.after_attention, *parts.after_mlp}
    known |= {(*attention, name) for name in (*parts.inputs, *parts.qk_norm, parts.dropout)}
    known |= {(*attention[:1], "output", "dropout"), ("output", "dropout")}
    return known if parts.bias is None else known | {parts.bias}


def _check_complete(layer: nn.Module, parts: LayerParts) -> None:
    """Raise UnsupportedModelError for the first module or parameter that is none of the parts."""
    unknown = next(_unknown(layer, (), _known(parts)), None)
    if unknown is not None:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has a {'.'.join(unknown)} ({type(part(layer, unknown)).__name__}), and cpvit "
            "does not know what it is for"
        )


def _unknown(module: nn.Module, path: Path, known: set[Path]) -> Iterator[Path]:
    for name, _ in module.named_parameters(recurse=False):
        if (*path, name) not in known:
            yield (*path, name)
    for name, child in module.named_children():
        here = (*path, name)
        if here in known:
            continue
        if any(other[: len(here)] == here for other in known):
            yield from _unknown(child, here, known)
        elif not isinstance(child, nn.Identity):
            yield here


def _check_attention(layer: nn.Module, parts: LayerParts) -> None:
    """Raise UnsupportedModelError for an attention that is not over all tokens with a key for each head."""
    attention = part(layer, parts.attention)
    name = type(attention).__name__
    if not parts.heads:
        raise UnsupportedModelError(f"{name} does not say how many heads it has ({', '.join(HEADS)})")
    if getattr(attention, "is_causal", False):
        raise UnsupportedModelError(f"{name} is causal: each token attends to those before it only")
    if any(getattr(owner, "window_size", 0) for owner in (layer, attention)):
        raise UnsupportedModelError(f"{name} attends inside windows of the full patch grid")
    widths = {getattr(getattr(attention, projection), "out_features", None) for projection in parts.inputs}
    if len(widths) > 1:
        raise UnsupportedModelError(
            f"groups of heads share keys and values in {name} (grouped-query attention)"
        )
