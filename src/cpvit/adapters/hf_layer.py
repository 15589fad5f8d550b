"""A layer of Hugging Face transformers, seen as a block the cascade can run.

The layer's own modules do the work (norms, projections, LayerScale, DropPath, MLP, relative positions), and the
host's own function rotates; only their order is here.

Legend: B images, H heads, N tokens, P prefix tokens, n patches alive (N = P + n), N0 patches of the whole image,
D head dimension, C channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from cpvit.adapters.common import (
    SHARED_BIAS,
    heads_first,
    join_heads,
    linear_heads,
    linear_macs,
    look_up,
    pair_index,
    split_heads,
)
from cpvit.adapters.hf_parts import LayerParts, Path, part
from cpvit.adapters.host import BlockCosts, HeadParameter, UnsupportedModelError
from cpvit.attention import AttentionInputs
from cpvit.core import HostArguments, with_prefix


class Rotary(NamedTuple):
    """How a function of transformers wants what it rotates."""

    heads_first: bool
    """Query and key as [B H N D], else as [B N H D]."""
    has_prefix: bool
    """Whether sines and cosines have rows for the prefix tokens too."""


ROTARY: Mapping[str, Rotary] = MappingProxyType(
    {
        "apply_rotary_pos_emb": Rotary(heads_first=True, has_prefix=False),
        "apply_rotary_pos_emb_vision": Rotary(heads_first=False, has_prefix=True),
    }
)
"""Functions that rotate query and key, by their name in the module of the attention."""


class TransformersBlock:
    """A pre-norm layer: norm, attention, residual, norm, MLP, residual.

    Args:
        layer: The host's layer.
        parts: Where its parts are.
        num_prefix: P.
        shared_bias: Name of the argument under which the host hands one bias [1 H N N] to all layers, if it does.
        padded: Whether ``attention_mask`` is the host's own, over patches that are padding, the same for all queries.
    """

    def __init__(
        self,
        layer: nn.Module,
        parts: LayerParts,
        *,
        num_prefix: int,
        shared_bias: str = "",
        padded: bool = False,
    ) -> None:
        self.module: Any = layer
        self.parts = parts
        self.num_prefix = num_prefix
        self.shared_bias = shared_bias
        self.padded = padded

    @property
    def attn(self) -> Any:
        """The module with the projections of query, key and value."""
        return part(self.module, self.parts.attention)

    @property
    def projection(self) -> Any:
        """Output projection of the attention."""
        return part(self.module, self.parts.projection)

    @property
    def num_heads(self) -> int:
        """Heads the layer has now."""
        return int(getattr(self.attn, self.parts.heads))

    def attention_inputs(self, x: Tensor, positions: Tensor | None, extra: HostArguments) -> AttentionInputs:
        """x [B N C] -> query, key, value [B H N D], and the bias of the pairs still alive."""
        own = "attention_mask" if self.padded else self.shared_bias
        refuse_masks({name: value for name, value in extra.items() if name != own})
        query, key, value = self._project(part(self.module, self.parts.norm1)(x))
        if extra.get("position_embeddings") is not None:
            query, key = self._rotate(query, key, extra["position_embeddings"], positions)
        return AttentionInputs(
            query=query,
            key=key,
            value=value,
            scale=self._scale(query),
            bias=self._padding(positions, extra) if self.padded else self._bias(positions, extra),
            dropout=self._dropout(),
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B N C] -> three of [B H N D]."""
        attn, parts = self.attn, self.parts
        if len(parts.inputs) == 1:
            return split_heads(getattr(attn, parts.inputs[0])(x), self.num_heads)
        query, key, value = (getattr(attn, name)(x) for name in parts.inputs)
        if parts.qk_norm:
            query, key = (
                self._normalised(norm, y) for norm, y in zip(parts.qk_norm, (query, key), strict=True)
            )
        query, key, value = (heads_first(y, self.num_heads) for y in (query, key, value))
        return query, key, value

    def _normalised(self, name: str, x: Tensor) -> Tensor:
        """Query or key [B N H*D], normalised over all channels or over those of each head, as its weight is long."""
        norm = getattr(self.attn, name)
        weight = getattr(norm, "weight", None)
        if weight is None or weight.numel() == x.shape[-1]:
            return norm(x)
        return norm(x.unflatten(-1, (self.num_heads, -1))).flatten(-2)

    def _scale(self, query: Tensor) -> float:
        name = self.parts.scale
        return float(getattr(self.attn, name)) if name else query.shape[-1] ** -0.5

    def _dropout(self) -> float:
        """Probability of dropping an attention weight now."""
        if not self.attn.training or not self.parts.dropout:
            return 0.0
        rate = getattr(self.attn, self.parts.dropout)
        return float(getattr(rate, "p", rate))

    def _rotate(
        self, query: Tensor, key: Tensor, tables: Any, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Query and key [B H N D], rotated by the host's function with the rows of the tokens still alive."""
        name, function = rotary_function(self.attn)
        style = ROTARY[name]
        rows = (
            positions
            if positions is None or not style.has_prefix
            else with_prefix(positions, self.num_prefix)
        )
        # [N0 D] as it is, or [B n D] of the survivors, with a dimension of heads where the function adds none.
        tables = tables if rows is None else [table[rows] for table in tables]
        if style.heads_first:
            tables = tables if rows is None else [table.unsqueeze(1) for table in tables]
            rotated: tuple[Tensor, Tensor] = function(query, key, *tables)
            return rotated
        query, key = function(query.transpose(1, 2), key.transpose(1, 2), *tables)
        return query.transpose(1, 2), key.transpose(1, 2)

    def _padding(self, positions: Tensor | None, extra: HostArguments) -> Tensor | None:
        """-inf for the keys that are padding, of those alive: [B 1 1 N], or None."""
        mask = extra.get("attention_mask")
        if not isinstance(mask, Tensor):
            return None
        row = mask[:, :, :1]
        if row.dtype == torch.bool:
            row = torch.zeros_like(row, dtype=self.projection.weight.dtype).masked_fill(~row, -torch.inf)
        if positions is None:
            return row
        rows = with_prefix(positions, self.num_prefix)
        return row[:, 0, 0].expand(rows.shape[0], row.shape[-1]).gather(1, rows)[:, None, None]

    def _bias(self, positions: Tensor | None, extra: HostArguments) -> Tensor | None:
        """The layer's own bias and the shared one, over the pairs still alive: [1 H N N] or [B H N N], or None."""
        biases = [self._own_bias(positions, extra)] if self.parts.bias else []
        shared = extra.get(self.shared_bias)
        biases += [shared] if isinstance(shared, Tensor) else []
        if not biases:
            return None
        bias = biases[0] if len(biases) == 1 else biases[0] + biases[1]
        if bias.shape[0] != 1 and not _exporting():
            raise ValueError(_SPEAKS_OF_PATCHES.format("attention_mask"))
        bias = bias[:1]  # while exporting, an empty mask of the host's has been added for every image
        if positions is None:
            return bias
        pairs = pair_index(positions, self.num_prefix, bias.shape[-1])
        return look_up(bias[0].flatten(1), pairs, self.num_prefix + positions.shape[1])

    def _own_bias(self, positions: Tensor | None, extra: HostArguments) -> Tensor:
        """What the host's module of relative positions gives for the whole image: [1 H P+N0 P+N0]."""
        assert self.parts.bias is not None
        patch, resolution = self.attn.config.patch_size, cast("tuple[int, int]", extra["resolution"])
        window = (resolution[0] // patch, resolution[1] // patch)
        tokens = self.num_prefix + window[0] * window[1]
        bias: Tensor = part(self.module, self.parts.bias)(
            window, interpolate_pos_encoding=bool(extra.get("interpolate_pos_encoding")), dim_size=tokens
        )
        return bias

    def attention_residual(self, x: Tensor, inputs: AttentionInputs, out: Tensor) -> Tensor:
        """x [B N C], out [B H N D] -> [B N C]."""
        return x + self._apply(self.parts.after_attention, self.projection(join_heads(out)))

    def mlp_residual(self, x: Tensor) -> Tensor:
        """[B N C] -> [B N C]."""
        normed = part(self.module, self.parts.norm2)(x)
        return x + self._apply((*self.parts.mlp, *self.parts.after_mlp), normed)

    def _apply(self, paths: Sequence[Path], x: Tensor) -> Tensor:
        """The layer's modules and factors at these paths, one after the other: [B N C] -> [B N C]."""
        for path in paths:
            found = part(self.module, path)
            x = found(x) if isinstance(found, nn.Module) else found * x
        return x

    def costs(self) -> BlockCosts:
        """MACs per token and per pair of tokens."""
        attn = self.attn
        inputs = sum(linear_macs(getattr(attn, name)) for name in self.parts.inputs)
        return BlockCosts(
            attention_token=inputs + linear_macs(self.projection),
            pair=2 * self.projection.in_features,
            mlp_token=sum(linear_macs(part(self.module, path)) for path in self.parts.mlp),
        )

    def head_parameters(self) -> Sequence[HeadParameter]:
        """Rows of Q, K and V and columns of the projection; the columns of a table of relative positions."""
        attn, parts = self.attn, self.parts
        if self.shared_bias:
            raise UnsupportedModelError(SHARED_BIAS)
        inputs = [getattr(attn, name) for name in parts.inputs]
        for linear in (*inputs, self.projection):
            if type(linear) is not nn.Linear:
                raise UnsupportedModelError(
                    f"heads cannot be pruned where a projection is a {type(linear).__name__} (quantised, or "
                    "with an adapter): its weights cannot be cut; prune patches only (head_keep_rate=1)"
                )
        groups = 3 // len(inputs)
        width = inputs[0].out_features // (groups * self.num_heads)
        self._refuse_joint_norms(width)
        found = [item for linear in inputs for item in linear_heads(linear, 0, groups, width)]
        if parts.bias:
            table = part(self.module, parts.bias)
            found.append(HeadParameter(table, "relative_position_bias_table", 1, 1, 1))
        return [*found, HeadParameter(self.projection, "weight", 1, 1, width)]

    def _refuse_joint_norms(self, width: int) -> None:
        norms = [getattr(self.attn, name) for name in self.parts.qk_norm]
        if any(getattr(norm, "weight", None) is not None and norm.weight.numel() != width for norm in norms):
            raise UnsupportedModelError(
                "heads cannot be pruned in this model: it normalises the queries of all heads together, "
                "so that removing one changes all others; prune patches only (head_keep_rate=1)"
            )

    def set_num_heads(self, count: int) -> None:
        """The host's own forward reads its shapes from the weights; it keeps the count for others to read."""
        setattr(self.attn, self.parts.heads, count)


def rotary_function(attention: nn.Module) -> tuple[str, Callable[..., Any]]:
    """The function by which the host rotates query and key, and its name.

    Raises:
        UnsupportedModelError: There is none that is known.
    """
    namespace = vars(sys.modules[type(attention).__module__])
    for name in ROTARY:
        if name in namespace:
            return name, namespace[name]
    raise UnsupportedModelError(
        f"{type(attention).__name__} rotates its queries in a way that is not known (not by {' or '.join(ROTARY)})"
    )


def refuse_masks(extra: HostArguments) -> None:
    """Only the arguments that change the attention matter; transformers passes others through its layers.

    While exporting, transformers builds a mask that masks nothing (it drops it otherwise, where it can look
    at it): that one is not an argument of the user's, and is left out of the exported graph.
    """
    values = {name: extra.get(name) for name in ("attention_mask", "is_causal")}
    given = [name for name, value in values.items() if value is not None and value is not False]
    if given and not _exporting():
        raise ValueError(_SPEAKS_OF_PATCHES.format(" and ".join(given)))


_SPEAKS_OF_PATCHES = "a pruned model cannot take {}: it speaks of patches that may have left"


def _exporting() -> bool:
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())
