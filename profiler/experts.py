"""Mixtures of experts in a form that can be captured: what a transformers model is told to use for its experts.

transformers' own choices loop over the experts that were hit (which depends on the data), gather each token's weights
(terabytes), or use a grouped matmul that has no float64. Ours is shardwright::expert_mlp (expert_ops.py), whatever lies
between an expert's two products, as long as it looks at each row alone (gates.py): weights may be transposed and have
biases. What it cannot say (a norm behind each expert) keeps the grouped matmul.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import expert_ops  # noqa: F401  registers the operator
from .gates import traced_gate

# class of the activation module -> its name in gates.ACTIVATIONS
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
    weights = _weights_of(module)
    activation = None if weights is None else _activation_of(module, weights[0].shape[1], hidden_states.dtype)
    if weights is not None and activation is not None:
        op = torch.ops.shardwright.expert_mlp.bias if len(weights) > 2 else torch.ops.shardwright.expert_mlp.default
        out, _ = op(hidden_states, top_k_index, top_k_weights, *weights, activation)
        return out
    from transformers.integrations import moe

    # the grouped matmul's kernels know no float64
    other = moe.batched_mm_experts_forward if hidden_states.dtype == torch.float64 else moe.grouped_mm_experts_forward
    return other(module, hidden_states, top_k_index, top_k_weights)


def _weights_of(module: Any) -> list[torch.Tensor] | None:
    """Of both products, [E, out, in], and biases where there are any; None of what expert_mlp cannot say."""
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    if getattr(module, "has_post_expert_norm", False) or not hasattr(module, first):
        return None
    weights = [getattr(module, first), module.down_proj]
    if getattr(module, "is_transposed", False):
        weights = [weight.transpose(1, 2) for weight in weights]
    if getattr(module, "has_bias", False):
        weights += [getattr(module, f"{first}_bias"), module.down_proj_bias]
    return weights


def _activation_of(module: Any, width: int, dtype: torch.dtype) -> str | None:
    """What lies between the products, as expert_mlp takes it; None where it does more than look at each row.
    width: of the first product."""
    from transformers.integrations import moe

    has_gate = getattr(module, "has_gate", True)
    if has_gate and getattr(type(module), "_apply_gate", None) is getattr(moe, "_default_apply_gate", None):
        name = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
        if name is not None:
            return name
    return traced_gate(module._apply_gate if has_gate else module.act_fn, width, dtype)
