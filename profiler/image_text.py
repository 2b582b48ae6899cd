"""Batches of vision-language models: text in which placeholder tokens stand where the image's features go.

Every sample has one image. Its placeholders come first, as many as the vision tower and what follows it make features
of an image: a number that each family computes in its own way from its configuration, written down in _FAMILIES. The
loss is next-token over the text; placeholders are no targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ExitCode, ShardwrightError
from .inputs import BatchField

INTEGER = torch.int64
SHORTEST_TEXT = 4  # tokens


@dataclass(frozen=True)
class Image:
    """One sample's image: its entry of the batch without the batch dimension, and its placeholders in the text."""

    pixels: tuple[int, ...]
    num_tokens: int
    token: int | None = None
    token_types: tuple[int, int] | None = None  # of placeholders and of text, where the model is told which is which
    avoid: tuple[int, ...] = ()


def image_text_fields(config: Any, seq_len: int, dtype: torch.dtype) -> tuple[BatchField, ...]:
    """seq_len counts placeholders and text."""
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise ShardwrightError(
            f"{config.model_type}: how many tokens its image takes does not follow from its configuration",
            means=f"known are: {', '.join(_FAMILIES)}",
            change="MODEL",
            works="package.module:factory, which returns the model and a batch of yours",
            exit_code=ExitCode.USAGE,
        )
    image = family(config)
    shortest = image.num_tokens + SHORTEST_TEXT
    if seq_len < shortest:
        raise ShardwrightError(
            f"seq_len {seq_len}: an image of {config.model_type} takes {image.num_tokens} tokens",
            means="the sequence holds the image's placeholders and the text",
            change="--seq-len",
            works=f"--seq-len {-(-shortest // 64) * 64}",
        )
    text = config.get_text_config()
    placeholder = () if image.token is None else (image.token,)
    avoid = placeholder + image.avoid
    head = placeholder * image.num_tokens
    fields = [
        BatchField("input_ids", (seq_len,), INTEGER, "tokens", high=text.vocab_size, head=head, avoid=avoid),
        BatchField("pixel_values", image.pixels, dtype, "normal"),
        BatchField("labels", (seq_len,), INTEGER, "same", of="input_ids", avoid=placeholder),
    ]
    if image.token_types is not None:
        of_image, of_text = image.token_types
        types = (of_image,) * image.num_tokens + (of_text,) * (seq_len - image.num_tokens)
        fields.insert(1, BatchField("token_type_ids", (seq_len,), INTEGER, "constant", values=types))
        fields.insert(1, BatchField("attention_mask", (seq_len,), INTEGER, "constant", values=(1,) * seq_len))
    return tuple(fields)


def _size(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[-2]), int(value[-1]))


def _pixels(vision: Any) -> tuple[int, int, int]:
    return (getattr(vision, "num_channels", 3), *_size(vision.image_size))


def _patches(vision: Any) -> int:
    (height, width), (rows, columns) = _size(vision.image_size), _size(vision.patch_size)
    return (height // rows) * (width // columns)


def _llava(config: Any) -> Image:
    """Every patch; with the class token where the strategy is not to drop the first."""
    vision = config.vision_config
    has_class_token = "siglip" not in vision.model_type
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    count = _patches(vision) + has_class_token - (strategy == "default")
    return Image(_pixels(vision), count, config.image_token_id)


def _paligemma(config: Any) -> Image:
    """The image is a prefix that sees itself whole (type 0); the text behind it is causal (type 1)."""
    return Image(_pixels(config.vision_config), _patches(config.vision_config), config.image_token_id, (0, 1))


def _gemma3(config: Any) -> Image:
    """Patches are pooled to a fixed number of tokens (type 1), which see each other; text is type 0."""
    return Image(_pixels(config.vision_config), config.mm_tokens_per_image, config.image_token_id, (1, 0))


def _shuffled(ratio: Callable[[Any], float]) -> Callable[[Any], Image]:
    """Neighbouring patches are joined into one token: ratio(config) of them along each side become one."""

    def family(config: Any) -> Image:
        count = round(_patches(config.vision_config) / ratio(config) ** 2)
        return Image(_pixels(config.vision_config), count, config.image_token_id)

    return family


def _idefics3(config: Any) -> Image:
    """Images of a sample have a dimension of their own."""
    count = round(_patches(config.vision_config) / config.scale_factor**2)
    return Image((1, *_pixels(config.vision_config)), count, config.image_token_id)


def _blip2(config: Any) -> Image:
    return Image(_pixels(config.vision_config), config.num_query_tokens, config.image_token_id)


def _beside(config: Any) -> Image:
    """The text attends to the image, or follows it, without placeholders."""
    return Image(_pixels(config.vision_config), 0)


_FAMILIES: dict[str, Callable[[Any], Image]] = {
    "llava": _llava,
    "vipllava": _llava,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "internvl": _shuffled(lambda config: 1 / config.downsample_ratio),
    "aya_vision": _shuffled(lambda config: config.downsample_factor),
    "cohere2_vision": _shuffled(lambda config: config.downsample_factor),
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "blip-2": _blip2,
    "blip": _beside,
    "git": _beside,
}
