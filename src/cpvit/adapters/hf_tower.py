"""The image tower of a model of Hugging Face transformers: where its layers are, and what reads their tokens.

Everything around the layers has to be known, as everything in a layer has: a module between them, or one that reads
the tokens after them, may need every patch in its place. Such a model is refused, and the module is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from cpvit.adapters.hf_parts import POSITION_BIAS, Path, is_layer, part
from cpvit.adapters.host import UnsupportedModelError

EMBEDS = ("embed", "patch_conv")
"""In the names of modules that make the tokens."""

PREFIX_TOKENS = ("cls_token", "class_token", "class_embedding", "distillation_token", "register_tokens")
"""Parameters of the embeddings that are tokens in front of the patches."""

SUFFIX_TOKENS = ("detection_tokens",)

SHARED_BIAS = ("shared_position_bias", POSITION_BIAS)

READS_TOKEN_BY_TOKEN = (
    "pooler", "classifier", "cls_classifier", "distillation_classifier", "visual_projection", "fc_norm", "dropout",
)  # fmt: skip
"""Modules after the layers that need no patch in its place."""

POOLS = ("head",)


class Tower(NamedTuple):
    """An image tower inside a model."""

    model: Any
    at: Path
    """Path of the tower; () if the model is one."""
    layers_at: Path
    """From the tower to the container of its layers."""
    num_prefix: int
    shared_bias: bool
    """Whether the layers share one bias of relative positions."""

    @property
    def module(self) -> Any:
        """The tower."""
        return part(self.model, self.at)

    @property
    def parent(self) -> Any:
        """What holds the container of the layers."""
        return part(self.module, self.layers_at[:-1])

    @property
    def pool(self) -> Any:
        """Attention pooling over the tokens, or None."""
        return next((getattr(self.module, name, None) for name in POOLS), None)


def find_tower(model: Any) -> Tower:
    """The tower of a model that has one.

    Raises:
        UnsupportedModelError: It has none, or more, or parts that are not known.
    """
    stacks = list(_stacks(model, ()))
    if not stacks:
        raise UnsupportedModelError("it has no list of layers with norm, attention, norm and MLP")
    if len(stacks) > 1:
        names = ", ".join(".".join(path) for path in stacks)
        raise UnsupportedModelError(
            f"it has {len(stacks)} stacks of layers ({names}){_way_out(model, stacks)}"
        )
    if not sees_images(type(model)):
        raise UnsupportedModelError(
            f"it reads {_first_argument(type(model))} first; give a model, or a tower, that sees images"
        )
    if needed := _needed(type(model)):
        raise UnsupportedModelError(
            f"its forward also needs {', '.join(needed)}, while cpvit gives it images alone"
        )
    (path,) = stacks
    at = _tower_of(model, path)
    tower = part(model, at)
    layers_at = path[len(at) :]
    shared = False
    for depth in range(len(path)):
        owner = part(model, path[:depth])
        unknown = _unknown(owner, path[depth], inside=depth > len(at), outside=depth < len(at))
        if unknown in SHARED_BIAS and depth >= len(at):
            shared, unknown = True, None
        if unknown is not None:
            raise UnsupportedModelError(_reads(owner, unknown, path[:depth], at))
    return Tower(model, at, layers_at, _num_prefix(tower, layers_at), shared)


def _stacks(module: nn.Module, path: Path) -> Iterator[Path]:
    """Paths of the containers of layers, none of them inside another."""
    children = list(module.children())
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and children and all(map(is_layer, children)):
        yield path
        return
    for name, child in module.named_children():
        yield from _stacks(child, (*path, name))


def _tower_of(model: nn.Module, stack: Path) -> Path:
    """Path of the nearest module around the layers that also makes their tokens."""
    for depth in reversed(range(len(stack))):
        names = [name for name, _ in part(model, stack[:depth]).named_children()]
        if any(word in name for word in EMBEDS for name in names):
            return stack[:depth]
    raise UnsupportedModelError("it has layers, but nothing that cuts an image into patches")


def _way_out(model: nn.Module, stacks: Sequence[Path]) -> str:
    """Which part to prune instead, if one sees images."""
    for stack in stacks:
        for depth in range(1, len(stack)):
            inner = part(model, stack[:depth])
            if hasattr(inner, "config") and sees_images(type(inner)):
                return f"; prune the one that sees the image: prune_(model.{'.'.join(stack[:depth])}, ...)"
    return ""


def sees_images(kind: type) -> bool:
    """Whether the first argument of a class of transformers is an image, or a video."""
    return _first_argument(kind) == "pixel_values"


def _first_argument(kind: Any) -> str:
    """Name of what the forward is given first."""
    return [*inspect.signature(kind.forward).parameters, "nothing", "nothing"][1]


def _needed(kind: Any) -> list[str]:
    """Arguments without which the forward does not run, after the first."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[2:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one.name for one in parameters if one.default is one.empty and one.kind not in variable]


def _unknown(owner: nn.Module, inner: str, *, inside: bool, outside: bool) -> str | None:
    """The first module beside the way to the layers that is not known; None if all are."""
    for name, child in owner.named_children():
        known = name == inner or isinstance(child, nn.Identity) or "norm" in type(child).__name__.lower()
        known = known or (not inside and not outside and any(word in name for word in (*EMBEDS, *POOLS)))
        if not known and (inside or name not in READS_TOKEN_BY_TOKEN):
            return name
    return None


def _reads(owner: nn.Module, name: str, path: Path, tower: Path) -> str:
    place = ".".join((*path, name))
    kind = type(getattr(owner, name)).__name__
    if len(path) >= len(tower):
        return f"its {place} ({kind}) is not known, and may need every patch in its place"
    return (
        f"its {place} ({kind}) may need every patch in its place; prune the tower below it, so that it gives "
        f"the full grid: prune_(model.{'.'.join(tower)}, ..., dense_features=True)"
    )


def _num_prefix(tower: nn.Module, layers_at: Path) -> int:
    """Tokens that the embeddings put in front of the patches.

    Raises:
        UnsupportedModelError: They put some behind them.
    """
    count = 0
    for name, child in tower.named_children():
        if name == layers_at[0] or not any(word in name for word in EMBEDS):
            continue
        for owner in child.modules():
            for token, parameter in owner.named_parameters(recurse=False):
                if token in SUFFIX_TOKENS:
                    raise UnsupportedModelError(
                        f"its {name}.{token} stand behind the patches in the sequence"
                    )
                if token in PREFIX_TOKENS:
                    count += 1 if parameter.dim() == 1 else parameter.shape[-2]
    return count
