"""How shardwright::expert_mlp splits: by tokens, which are independent, or by experts, whose results add up."""

from __future__ import annotations

import torch

from ..profiler import expert_ops  # noqa: F401  defines the operators
from ..profiler.op_view import OpView
from .placement import P, R
from .rules import RULES
from .strategy import Strategy


def expert_mlp(view: OpView) -> list[Strategy]:
    """(hidden, index, weight, gate_up, down) -> out, pre. A rank leaves out the choices of experts that it lacks."""
    tokens = Strategy((0, 0, 0, R, R), (0, 0))
    experts = Strategy((R, R, R, 0, 0), (P, P), lowering="own_experts")
    return [tokens, experts]


def expert_mlp_backward(view: OpView) -> list[Strategy]:
    """(grad_out, hidden, index, weight, gate_up, down, pre) -> gradients of hidden, weight, gate_up, down.

    Split by experts, gate and up are computed again: what the forward kept need not be this rank's part.
    """
    if len(view.inputs) != 7:
        return []
    tokens = Strategy((0, 0, 0, 0, R, R, 0), (0, 0, P, P))
    experts = Strategy((R, R, R, R, 0, 0, P), (P, P, 0, 0), lowering="own_experts_backward")
    return [tokens, experts]


RULES[torch.ops.shardwright.expert_mlp] = expert_mlp
RULES[torch.ops.shardwright.expert_mlp_backward] = expert_mlp_backward
