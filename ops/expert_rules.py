"""How shardwright::expert_mlp splits: by tokens, which are independent, or by experts, whose results add up.

On an axis that carries the batch, tokens are split. Experts are either whole there (gather: their state is ZeRO's to
split and to gather), or split too, and then tokens are sent to them and back (dispatch: passes/expert_dispatch.py).
"""

from __future__ import annotations

import torch
from torch import fx

from ..profiler import expert_ops  # noqa: F401  defines the operators
from ..profiler.op_view import OpView
from .placement import P, Places, R
from .rules import RULES
from .strategy import Strategy

FORMS = ("gather", "dispatch")
_DISPATCH = "dispatch_experts"


def is_expert_op(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in (_FORWARD, _BACKWARD)


def form_of(strategy: Strategy) -> str:
    """What a strategy of an expert op on an axis that carries the batch is called."""
    return "dispatch" if is_dispatch(strategy) else "gather"


def is_dispatch(strategy: Strategy) -> bool:
    return strategy.lowering.startswith(_DISPATCH)


def makes_again(node: fx.Node, output: int, places: Places) -> bool:
    """Is this result of an expert op one that the backward computes again, and does not keep? Where experts are split,
    what the forward had before the activation is no part that the backward could use; it lies as a partial sum. Where
    tokens are sent to them it stays with the experts, and is kept."""
    return output == 1 and P in places and getattr(node.target, "overloadpacket", None) is _FORWARD


def expert_mlp(view: OpView) -> list[Strategy]:
    """(hidden, index, weight, gate_up, down) -> out, pre. A rank leaves out the choices of experts that it lacks."""
    tokens = Strategy((0, 0, 0, R, R), (0, 0))
    experts = Strategy((R, R, R, 0, 0), (P, P), lowering="own_experts")
    dispatched = Strategy((0, 0, 0, 0, 0), (0, 0), lowering=_DISPATCH, of_experts=True)
    return [tokens, experts, dispatched]


def expert_mlp_backward(view: OpView) -> list[Strategy]:
    """(grad_out, hidden, index, weight, gate_up, down, pre) -> gradients of hidden, weight, gate_up, down.

    Split by experts, gate and up are computed again: what the forward kept need not be this rank's part.
    """
    if len(view.inputs) != 7:
        return []
    tokens = Strategy((0, 0, 0, 0, R, R, 0), (0, 0, P, P))
    experts = Strategy((R, R, R, R, 0, 0, P), (P, P, 0, 0), lowering="own_experts_backward")
    dispatched = Strategy((0, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0), lowering=f"{_DISPATCH}_backward", of_experts=True)
    return [tokens, experts, dispatched]


_FORWARD, _BACKWARD = torch.ops.shardwright.expert_mlp, torch.ops.shardwright.expert_mlp_backward
RULES[_FORWARD] = expert_mlp
RULES[_BACKWARD] = expert_mlp_backward
