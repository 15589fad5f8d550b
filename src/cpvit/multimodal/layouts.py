"""Where the vision-language models of Hugging Face transformers keep their image tower, and what reads its tokens.

A model of another class is refused: only its own code knows how many tokens it expects of an image, and whether it
needs them on a grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import nn

from cpvit.adapters import Host, UnsupportedModelError


class Layout(NamedTuple):
    """Parts of a vision-language model, by their names."""

    tower: str
    connector: str
    """What turns tokens of the tower into tokens of the text model."""
    chosen: Literal["before", "after", "packed"]
    """Where tokens are left out: before a connector that treats each token alone, after one that joins neighbours of
    the grid, or where the model has packed the crops of an image into one sequence."""
    counter: str
    """Attribute of the processor that its number of image tokens comes from; "" if it computes one per image."""
    factor: str = ""
    """Setting of the model that says how many rows, and columns, of patches the connector joins."""


KNOWN: Mapping[str, Layout] = MappingProxyType(
    {
        "LlavaModel": Layout(
            "vision_tower", "multi_modal_projector", "before", "num_additional_image_tokens"
        ),
        "LlavaNextModel": Layout("vision_tower", "multi_modal_projector", "packed", ""),
        "PaliGemmaModel": Layout("vision_tower", "multi_modal_projector", "before", "image_seq_length"),
        "Idefics3Model": Layout("vision_model", "connector", "after", "image_seq_len", "scale_factor"),
        "SmolVLMModel": Layout("vision_model", "connector", "after", "image_seq_len", "scale_factor"),
        "InternVLModel": Layout(
            "vision_tower", "multi_modal_projector", "after", "image_seq_length", "downsample_ratio"
        ),
    }
)
"""Class that holds tower and text model -> its parts."""

SUPPORTED = "LLaVA, LLaVA-NeXT, PaliGemma, Idefics3, SmolVLM and InternVL of Hugging Face transformers"

_QWEN = (
    "its visual.merger joins 2 x 2 neighbours, its blocks attend inside windows or pack images of all sizes into one "
    "sequence, and the text positions are computed from the grid (get_rope_index): no patch can be left out"
)
_RESAMPLES = "its {} resamples the full grid of patches"
_QUERIES = (
    "its qformer gives the text model a fixed number of tokens already; prune the tower alone: "
    "prune_(model.vision_model, ...)"
)
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "Qwen2VLModel": _QWEN,
        "Qwen2_5_VLModel": _QWEN,
        "Qwen3VLModel": _QWEN,
        "LlavaOnevisionModel": _RESAMPLES.format("apply_pooling / pack_image_features"),
        "Gemma3Model": _RESAMPLES.format("multi_modal_projector (average pooling)"),
        "Mistral3Model": "its tower (Pixtral) packs the images of a batch into one sequence",
        "Blip2Model": _QUERIES,
        "Blip2ForConditionalGeneration": _QUERIES,
        "InstructBlipForConditionalGeneration": _QUERIES,
    }
)
"""Class -> why it cannot be pruned."""


@dataclass(frozen=True)
class Eyes:
    """A vision-language model taken apart."""

    model: Any
    """What holds tower, connector and text model."""
    layout: Layout

    @property
    def tower(self) -> nn.Module:
        """The image tower."""
        found: nn.Module = getattr(self.model, self.layout.tower)
        return found

    @property
    def connector(self) -> nn.Module:
        """What reads the tower's tokens."""
        found: nn.Module = getattr(self.model, self.layout.connector)
        return found

    @property
    def factor(self) -> int:
        """Rows, and columns, of patches that become one token of the text model."""
        if not self.layout.factor:
            return 1
        value = getattr(self.model.config, self.layout.factor)
        return int(value) if value >= 1 else round(1 / value)

    def feature_block(self, depth: int) -> int:
        """The block whose tokens the connector reads, the deepest if it reads several.

        Raises:
            UnsupportedModelError: It reads what enters the first block.
        """
        layers = getattr(self.model.config, "vision_feature_layer", -1)
        layers = [layers] if isinstance(layers, int) else list(layers)
        block = max(layer - 1 if layer >= 0 else depth + layer for layer in layers)
        if block < 0:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} reads what enters the first of {depth} blocks (config."
                f"vision_feature_layer={layers}), where no patch has left"
            )
        return block

    def handed_prefix(self, host: Host) -> int:
        """Prefix tokens (the class token ...) that reach the connector along with the patches.

        Raises:
            UnsupportedModelError: The model would leave out a patch for a class token, or packs one as a patch.
        """
        strategy = getattr(self.model.config, "vision_feature_select_strategy", None)
        if strategy != "default":
            if host.num_prefix and self.layout.chosen != "before":
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} lays the class token of its tower out with the patches; set "
                    "config.vision_feature_select_strategy='default'"
                )
            return host.num_prefix
        if not host.num_prefix:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} leaves out the first token of its tower (config."
                "vision_feature_select_strategy='default'), which is a patch: the tower has no class token; set 'full'"
            )
        return host.num_prefix - 1


def take_apart(model: nn.Module) -> Eyes:
    """The parts of a vision-language model.

    Raises:
        UnsupportedModelError: It is none that cpvit knows; the message names the part that does not fit.
    """
    inner = getattr(model, "model", model)
    for one in (model, inner):
        for name in (kind.__name__ for kind in type(one).__mro__):
            if name in KNOWN:
                return Eyes(one, KNOWN[name])
            if name in REFUSED:
                raise UnsupportedModelError(
                    f"{type(model).__name__} cannot be pruned: {REFUSED[name]}. Supported: {SUPPORTED}."
                )
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be pruned: how it joins image and text is not known. Supported: {SUPPORTED}. "
        "An image tower alone, or a model that classifies images: prune_(model, ...)."
    )
