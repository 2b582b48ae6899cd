"""Mixtures of experts in a form that can be captured: what a transformers model is told to use for its experts.

transformers' own choices loop over the experts that were hit (which depends on the data), gather each token's weights
(terabytes), or use a grouped matmul that has no float64. Ours is shardwright::expert_mlp (expert_ops.py) for the common
shape: gate and up joined in one weight, no biases. Other shapes keep the grouped matmul.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import expert_ops  # noqa: F401  registers the operator

# class of the activation module -> its name in expert_ops.ACTIVATIONS
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


def register(name: str) -> bool:
    """Register the experts function with transformers; False where this version has no such interface."""
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError:
        return False
    ExpertsInterface.register(name, experts_forward)
    return True


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface. hidden_states [N, H], top_k_index and top_k_weights [N, K]; returns [N, H]."""
    activation = _activation_of(module)
    if activation is not None:
        out, _ = torch.ops.shardwright.expert_mlp(
            hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, activation
        )
        return out
    from transformers.integrations import moe

    # the grouped matmul's kernels know no float64
    other = moe.batched_mm_experts_forward if hidden_states.dtype == torch.float64 else moe.grouped_mm_experts_forward
    return other(module, hidden_states, top_k_index, top_k_weights)


def _activation_of(module: Any) -> str | None:
    """The activation's name where the module has the shape that expert_mlp computes, else None."""
    from transformers.integrations import moe

    usual = (
        hasattr(module, "gate_up_proj")
        and getattr(module, "has_gate", True)
        and not getattr(module, "has_bias", False)
        and not getattr(module, "is_transposed", False)
        and not getattr(module, "has_post_expert_norm", False)
        and getattr(module, "is_concatenated", True)
        and getattr(type(module), "_apply_gate", None) is getattr(moe, "_default_apply_gate", None)
    )
    return _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__) if usual else None
