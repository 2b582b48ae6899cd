"""Configurations of the models that public recipes train, at their real sizes.

Sizes are those of the config.json that each model's publisher keeps on the Hugging Face hub; what is not said is
transformers' default of the model type.
"""

from __future__ import annotations

import re
from typing import Any

Config = dict[str, Any]


def _dense(kind: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> Config:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        **more,
    }


def _latent(
    kind: str, hidden: int, ffn: int, layers: int, heads: int, vocab: int, experts: int, expert_ffn: int, **more: Any
) -> Config:
    """Of DeepSeek's kind: multi-head latent attention and routed experts beside shared ones."""
    latent = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    routed = {"n_routed_experts": experts, "moe_intermediate_size": expert_ffn}
    return _dense(kind, hidden, ffn, layers, heads, heads, vocab, **latent, **routed, **more)


_TIED = {"tie_word_embeddings": True}
_QWEN2, _QWEN3, _LLAMA3 = 152064, 151936, 128256
_LLAMA32 = {"head_dim": 64, **_TIED}

MODELS: dict[str, Config] = {
    "llama2_7b": _dense("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama32_1b": _dense("llama", 2048, 8192, 16, 32, 8, _LLAMA3, **_LLAMA32),
    "llama32_3b": _dense("llama", 3072, 8192, 28, 24, 8, _LLAMA3, **_TIED),
    "llama3_8b": _dense("llama", 4096, 14336, 32, 32, 8, _LLAMA3),
    "llama3_70b": _dense("llama", 8192, 28672, 80, 64, 8, _LLAMA3),
    "llama31_405b": _dense("llama", 16384, 53248, 126, 128, 8, _LLAMA3),
    "qwen2_500m": _dense("qwen2", 896, 4864, 24, 14, 2, _QWEN3, **_TIED),
    "qwen2_1p5b": _dense("qwen2", 1536, 8960, 28, 12, 2, _QWEN3, **_TIED),
    "qwen2_7b": _dense("qwen2", 3584, 18944, 28, 28, 4, _QWEN2),
    "qwen2_72b": _dense("qwen2", 8192, 29568, 80, 64, 8, _QWEN2),
    "qwen25_14b": _dense("qwen2", 5120, 13824, 48, 40, 8, _QWEN2),
    "qwen25_32b": _dense("qwen2", 5120, 27648, 64, 40, 8, _QWEN2),
    "qwen3_600m": _dense("qwen3", 1024, 3072, 28, 16, 8, _QWEN3, head_dim=128, **_TIED),
    "qwen3_1p7b": _dense("qwen3", 2048, 6144, 28, 16, 8, _QWEN3, head_dim=128, **_TIED),
    "qwen3_4b": _dense("qwen3", 2560, 9728, 36, 32, 8, _QWEN3, head_dim=128, **_TIED),
    "qwen3_8b": _dense("qwen3", 4096, 12288, 36, 32, 8, _QWEN3, head_dim=128),
    "qwen3_14b": _dense("qwen3", 5120, 17408, 40, 40, 8, _QWEN3, head_dim=128),
    "qwen3_32b": _dense("qwen3", 5120, 25600, 64, 64, 8, _QWEN3, head_dim=128),
    "qwen3_30b_a3b": _dense("qwen3_moe", 2048, 6144, 48, 32, 4, _QWEN3, head_dim=128, moe_intermediate_size=768,
                            num_experts=128, num_experts_per_tok=8, norm_topk_prob=True),
    "qwen3_235b_a22b": _dense("qwen3_moe", 4096, 12288, 94, 64, 4, _QWEN3, head_dim=128, moe_intermediate_size=1536,
                              num_experts=128, num_experts_per_tok=8, norm_topk_prob=True),
    "qwen3_next_80b_a3b": {"model_type": "qwen3_next"},
    "qwen35_text_9b": {"model_type": "qwen3_5_text"},
    "qwen35_text_35b_a3b": {"model_type": "qwen3_5_moe_text"},
    "gemma2_2b": _dense("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256),
    "gemma2_9b": _dense("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256),
    "gemma2_27b": _dense("gemma2", 4608, 36864, 46, 32, 16, 256000, head_dim=128, query_pre_attn_scalar=144),
    "gemma3_1b": _dense("gemma3_text", 1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512),
    "ministral3_8b": {"model_type": "ministral3"},
    "gpt3_175b": {"model_type": "gpt2", "n_embd": 12288, "n_layer": 96, "n_head": 96, "vocab_size": 51200,
                  "n_positions": 2048},
    "glm45_355b": _dense("glm4_moe", 5120, 12288, 92, 96, 8, 151552, head_dim=128, moe_intermediate_size=1536,
                         n_routed_experts=160, first_k_dense_replace=3, use_qk_norm=True),
    "glm45_air_106b": _dense("glm4_moe", 4096, 10944, 46, 96, 8, 151552, head_dim=128),
    "gpt_oss_20b": _dense("gpt_oss", 2880, 2880, 24, 64, 8, 201088, num_local_experts=32),
    "gpt_oss_120b": _dense("gpt_oss", 2880, 2880, 36, 64, 8, 201088, num_local_experts=128),
    "olmoe_7b": _dense("olmoe", 2048, 1024, 16, 16, 16, 50304, num_experts=64, num_experts_per_tok=8),
    "deepseek_v2_lite": _latent("deepseek_v2", 2048, 10944, 27, 16, 102400, 64, 1408, q_lora_rank=None,
                                num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1),
    "deepseek_v2": _latent("deepseek_v2", 5120, 12288, 60, 128, 102400, 160, 1536, q_lora_rank=1536,
                           num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, n_group=8,
                           topk_group=3, topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    "deepseek_v3": _latent("deepseek_v3", 7168, 18432, 61, 128, 129280, 256, 2048, q_lora_rank=1536,
                           num_experts_per_tok=8, n_shared_experts=1, first_k_dense_replace=3, n_group=8,
                           topk_group=4),
    "kimi_k2": _latent("deepseek_v3", 7168, 18432, 61, 64, 163840, 384, 2048, q_lora_rank=1536,
                       num_experts_per_tok=8, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
    "moonlight_16b": _latent("deepseek_v3", 2048, 11264, 27, 16, 163840, 64, 1408, q_lora_rank=None,
                             num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1, n_group=1,
                             topk_group=1),
}  # fmt: skip
_SAME = {"llama31_8b": "llama3_8b", "llama31_70b": "llama3_70b", "qwen25_500m": "qwen2_500m",
         "qwen25_1p5b": "qwen2_1p5b", "qwen25_7b": "qwen2_7b", "qwen25_72b": "qwen2_72b"}  # fmt: skip


def model_of(recipe: str) -> str | None:
    """The name in MODELS of what a recipe trains; None where it is not among them, or sees more than text."""
    name = re.split(r"_(pretrain|sft|peft|finetune|lora|library)\b|_(?:pretrain|sft|peft|finetune)_", recipe)[0]
    name = _SAME.get(name.lstrip("_"), name.lstrip("_"))
    return name if name in MODELS else None
