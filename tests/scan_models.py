"""Small state-space and linear-attention models of transformers, for factories that worker processes import."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 31


class Language(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


def _mamba2() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 2, "chunk_size": 4}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, num_hidden_layers=1, vocab_size=VOCABULARY))


def _mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=VOCABULARY))


def _qwen3_next() -> nn.Module:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    sizes = {
        "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4, "intermediate_size": 24,
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    }  # fmt: skip
    kinds = {"layer_types": ["linear_attention"], "mlp_only_layers": [0]}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **kinds, num_hidden_layers=1, vocab_size=VOCABULARY))


MODELS = {"mamba2": _mamba2, "mamba": _mamba, "qwen3_next": _qwen3_next}


def _factory(name: str, length: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Language(MODELS[name]()), {"ids": torch.randint(VOCABULARY, (4, length))}


def __getattr__(name: str) -> Any:
    if name.startswith("make_"):
        return lambda: _factory(name.removeprefix("make_"), 10)
    if name.startswith("long_"):
        return lambda: _factory(name.removeprefix("long_"), 140)
    raise AttributeError(name)
