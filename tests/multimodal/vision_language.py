"""Small vision-language models of transformers with their processors, built without a network.

Towers: patches of 8 pixels on a 4 x 4 grid, C=24 channels in H=3 heads, 4 layers. Text models: 2 layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cpvit.measure.support import randomize_

TOWER = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 1400,
    "pad_token_id": 1,
    "max_position_embeddings": 512,
}
WORDS = [
    "[UNK]",
    "<pad>",
    "<s>",
    "</s>",
    "<image>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
    "what",
    "is",
    "this",
]
SIZE = {"height": 32, "width": 32}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


class Seeing(NamedTuple):
    """A vision-language model and what goes with it."""

    model: Any
    processor: Any
    prompt: str
    tower: Any
    token: int
    """The image token."""


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", **special},
    )


def clip_images() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)


def llava(strategy: str = "default", layer: Any = -2, tower: Any = None) -> Seeing:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER) if tower is None else tower,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=4,
        image_seq_length=16,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    processor = transformers.LlavaProcessor(
        clip_images(),
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(tower is None),
    )
    return finished(model, processor, "<image> what is this", model.model.vision_tower)


def llava_next() -> Seeing:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=4,
        image_grid_pinpoints=PINPOINTS,
    )
    model = transformers.LlavaNextForConditionalGeneration(config)
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS
    )
    processor = transformers.LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return finished(model, processor, "<image> what is this", model.model.vision_tower)


def paligemma(**tower: Any) -> Seeing:
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER, **tower},
        text_config={"model_type": "gemma", **TEXT},
        image_token_id=4,
        projection_dim=32,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    images = transformers.SiglipImageProcessor(size=SIZE)
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer())
    return finished(model, processor, "<image> what is this", model.model.vision_tower)


def idefics3() -> Seeing:
    config = transformers.Idefics3Config(
        vision_config=dict(TOWER),
        text_config={"model_type": "llama", **TEXT},
        image_token_id=4,
        scale_factor=2,
    )
    model = transformers.Idefics3ForConditionalGeneration(config)
    processor = transformers.Idefics3Processor(idefics3_images(), tokenizer(), image_seq_len=4)
    return finished(model, processor, "<image> what is this", model.model.vision_model)


def idefics3_images() -> Any:
    return transformers.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})


def smolvlm() -> Seeing:
    """Its own processor needs a package for videos; for images it is Idefics3's."""
    config = transformers.SmolVLMConfig(
        vision_config=dict(TOWER),
        text_config={"model_type": "llama", **TEXT},
        image_token_id=4,
        scale_factor=2,
    )
    model = transformers.SmolVLMForConditionalGeneration(config)
    processor = transformers.Idefics3Processor(idefics3_images(), tokenizer(), image_seq_len=4)
    return finished(model, processor, "<image> what is this", model.model.vision_model)


def internvl() -> Seeing:
    words = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = transformers.InternVLConfig(
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    model = transformers.InternVLForConditionalGeneration(config)
    images = transformers.GotOcr2ImageProcessor(size=SIZE, min_patches=1, max_patches=4)
    processor = transformers.InternVLProcessor(
        images, words, transformers.InternVLVideoProcessor(), image_seq_length=4
    )
    return finished(model, processor, "<IMG_CONTEXT> what is this", model.model.vision_tower)


def finished(model: Any, processor: Any, prompt: str, tower: Any) -> Seeing:
    randomize_(model)
    return Seeing(model.eval(), processor, prompt, tower, model.config.image_token_id)


MODELS: dict[str, Callable[[], Seeing]] = {
    "llava": llava,
    "llava with class token": lambda: llava("full"),
    "llava of two layers": lambda: llava(layer=[1, -2]),
    "llava next": llava_next,
    "paligemma": paligemma,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
}


def picture(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))


def inputs(seeing: Seeing, *pictures: Image.Image) -> Any:
    """A batch, a picture per prompt."""
    images = [[one] for one in pictures or (picture(),)]
    found = seeing.processor(
        images=images, text=[seeing.prompt] * len(images), return_tensors="pt", padding=True
    )
    found.pop("labels", None)
    return found


@torch.no_grad()
def logits(seeing: Seeing, given: Any) -> torch.Tensor:
    answer: torch.Tensor = seeing.model(**given).logits
    return answer


def image_tokens(seeing: Seeing, given: Any) -> list[int]:
    """In each prompt."""
    counts: list[int] = (given["input_ids"] == seeing.token).sum(dim=1).tolist()
    return counts
