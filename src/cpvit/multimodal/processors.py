"""How many image tokens a processor of transformers writes into a prompt, and how it is given another number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpvit.adapters import Host
from cpvit.multimodal.layouts import Eyes
from cpvit.multimodal.tokens import Choice, fewer

ABSENT = object()
"""Stands for an attribute that an object does not have itself."""


@dataclass(frozen=True)
class Setting:
    """An attribute of an object of transformers, set and to be put back."""

    owner: Any
    name: str
    value: Any
    before: Any

    @classmethod
    def of(cls, owner: Any, name: str, value: Any) -> Setting:
        """A value for an attribute, and what the object itself has there now."""
        return cls(owner, name, value, vars(owner).get(name, ABSENT))

    def apply(self) -> None:
        """Set it."""
        setattr(self.owner, self.name, self.value)

    def restore(self) -> None:
        """Put back what was there."""
        if self.before is ABSENT:
            vars(self.owner).pop(self.name, None)
        else:
            setattr(self.owner, self.name, self.before)


class FewerFeatures:
    """Stands in for LLaVA-NeXT's ``_get_unpadded_features``: an image of another shape has another number of tokens."""

    name = "_get_unpadded_features"

    def __init__(self, processor: Any, choice: Choice) -> None:
        self.processor = processor
        self.choice = choice

    def __call__(
        self, height: int, width: int, rows: int, columns: int, crops_high: int, crops_wide: int
    ) -> tuple[int, int]:
        """Tokens of the crops beyond the rows x columns of the whole image, and tokens that end their rows.

        The processor adds the full grid of the whole image, so the first number may be negative.
        """
        own = getattr(type(self.processor), self.name)
        unpadded, ends = own(self.processor, height, width, rows, columns, crops_high, crops_wide)
        whole = rows * columns
        return fewer(unpadded + whole, self.choice.keep, self.choice.patches) - whole, ends


def processor_settings(eyes: Eyes, host: Host, choice: Choice, processor: Any) -> list[Setting]:
    """What to set in a processor.

    Raises:
        ValueError: It is not the processor of this model, or was given another number already.
    """
    if processor is None:
        return []
    counter = eyes.layout.counter
    if not counter:
        _check_has(processor, FewerFeatures.name, eyes)
        return [Setting.of(processor, FewerFeatures.name, FewerFeatures(processor, choice))]
    _check_has(processor, counter, eyes)
    if counter == "num_additional_image_tokens":
        return [_additional(eyes, host, choice, processor)]
    if getattr(processor, counter) != choice.groups:
        raise ValueError(_OTHER_NUMBER.format(getattr(processor, counter), choice.groups))
    found = [Setting.of(processor, counter, choice.tokens)]
    images = getattr(processor, "image_processor", None)
    if counter in vars(images or object):
        found.append(Setting.of(images, counter, choice.tokens))
    return found


_OTHER_NUMBER = (
    "the processor writes {} image tokens, and the untouched model makes {} of an image; give the processor that "
    "belongs to it, as it was loaded (a processor that was saved while its model was pruned keeps the smaller number)"
)


def _check_has(processor: Any, name: str, eyes: Eyes) -> None:
    if not hasattr(processor, name):
        raise ValueError(
            f"{type(processor).__name__} has no {name}, from which the processor of {type(eyes.model).__name__} has "
            "its number of image tokens; give the processor that belongs to the model (AutoProcessor.from_pretrained)"
        )


def _additional(eyes: Eyes, host: Host, choice: Choice, processor: Any) -> Setting:
    """LLaVA's: a number that is added to that of the patches."""
    left_out = processor.vision_feature_select_strategy == "default"
    writes = (
        (host.image_shape[-2] // processor.patch_size) * (host.image_shape[-1] // processor.patch_size)
        + processor.num_additional_image_tokens
        - left_out
    )
    makes = choice.groups + eyes.handed_prefix(host)
    if writes != makes:
        raise ValueError(_OTHER_NUMBER.format(writes, makes))
    more = processor.num_additional_image_tokens - choice.groups + choice.tokens
    return Setting.of(processor, "num_additional_image_tokens", more)


def model_settings(eyes: Eyes, tokens: int) -> list[Setting]:
    """What to set in the model: the number of image tokens, where its configuration or the model keeps one."""
    if not eyes.layout.counter:
        return []  # LLaVA-NeXT's depends on the image
    owners = ((eyes.model.config, "image_seq_length"), (eyes.model, "image_seq_len"))
    return [Setting.of(owner, name, tokens) for owner, name in owners if name in vars(owner)]
