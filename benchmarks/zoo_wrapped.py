"""Models of transformers that no configuration alone gives: wrapped in a forward of their own, or with PEFT's adapters.

Each factory returns (module, batch); the module computes its own loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BATCH = 4
Made = tuple[nn.Module, dict[str, torch.Tensor]]


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(1)


class ImagesAndText(nn.Module):
    """Qwen2.5-VL over images of one size: its patches come as one row of all images, its grids are constants."""

    IMAGE, SIDE, PATCH = 59, 4, 12  # token that stands for an image; patches along a side; numbers in a patch

    def __init__(self) -> None:
        super().__init__()
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, vocab_size=60, max_position_embeddings=64,
                    rope_scaling={"rope_type": "default", "mrope_section": [1, 1, 2]})  # fmt: skip
        vision = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=2, temporal_patch_size=1,
                      window_size=8, out_hidden_size=16, fullatt_block_indexes=[1], in_channels=3)  # fmt: skip
        tokens = dict(image_token_id=self.IMAGE, video_token_id=58, vision_start_token_id=57, vision_end_token_id=56)
        config: Any = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        self.model = Qwen2_5_VLForConditionalGeneration(config)

    def forward(self, input_ids: torch.Tensor, patches: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        grid = torch.tensor([[1, self.SIDE, self.SIDE]] * len(patches))
        found: Any = self.model(
            input_ids=input_ids,
            pixel_values=patches.flatten(0, 1),
            image_grid_thw=grid,
            mm_token_type_ids=(input_ids == self.IMAGE).int(),
            labels=labels,
        )
        return found.loss


def qwen2_5_vl() -> Made:
    draw = _draw()
    tokens = torch.randint(0, 50, (BATCH, 10), generator=draw)
    tokens[:, 1], tokens[:, 2:6] = 57, ImagesAndText.IMAGE
    patches = torch.randn(BATCH, ImagesAndText.SIDE**2, ImagesAndText.PATCH, generator=draw)
    torch.manual_seed(0)
    return ImagesAndText(), {"input_ids": tokens, "patches": patches, "labels": tokens.clone()}


def _adapted(name: str, modules: list[str]) -> Made:
    """A model of zoo_configs with adapters of rank 2 on these modules; all else is frozen."""
    import peft
    import transformers
    import zoo_configs

    config = dict(zoo_configs.HF[name])
    model_class = getattr(transformers, config.pop("architectures")[0])
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{k: v for k, v in config.items() if k != "model_type"}))
    lora: Any = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    draw = _draw()
    if name == "vit":
        image = torch.randn(BATCH, 3, 8, 8, generator=draw)
        return adapted, {"pixel_values": image, "labels": torch.randint(0, 2, (BATCH,), generator=draw)}
    tokens = torch.randint(3, 60, (BATCH, 16), generator=draw)
    return adapted, {"input_ids": tokens, "labels": torch.randint(0, 3, (BATCH,), generator=draw)}


def lora_vit() -> Made:
    return _adapted("vit", ["q_proj", "v_proj"])


def lora_bert() -> Made:
    return _adapted("bert_sentence", ["query", "value"])


NAMES = ("qwen2_5_vl", "lora_vit", "lora_bert")
