"""How shardwright::expert_mlp splits: by tokens, which are independent, or by experts, whose results add up.

On an axis that carries the batch, tokens are split. Experts are either whole there (gather: their state is ZeRO's to
split and to gather), or split too, and then tokens are sent to them and back (dispatch: passes/expert_dispatch.py).
"""

from __future__ import annotations

import torch
from torch import fx

from ..profiler import expert_ops
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


def num_weights(node: fx.Node) -> int:
    """How many operands of an expert op hold experts: they stand one after the other."""
    return expert_ops.WEIGHTS["bias" if node.target in (_FORWARD.bias, _BACKWARD.bias) else "default"]


def weights_at(node: fx.Node) -> range:
    """Which of its operands hold experts; they stand behind gradient (of a backward), tokens, choices and weights."""
    first = 3 if node.target.overloadpacket is _FORWARD else 4  # type: ignore[union-attr]
    return range(first, first + num_weights(node))


def expert_mlp(view: OpView) -> list[Strategy]:
    """(hidden, index, weight, experts...) -> out, pre. A rank leaves out the choices of experts that it lacks."""
    n = num_weights(view.node)
    tokens = Strategy((0, 0, 0, *(R,) * n), (0, 0))
    experts = Strategy((R, R, R, *(0,) * n), (P, P), lowering="own_experts")
    dispatched = Strategy((0, 0, 0, *(0,) * n), (0, 0), lowering=_DISPATCH, of_experts=True)
    return [tokens, experts, dispatched]


def expert_mlp_backward(view: OpView) -> list[Strategy]:
    """(grad_out, hidden, index, weight, experts..., pre) -> gradients of hidden, weight, experts.

    Split by experts, gate and up are computed again: what the forward kept need not be this rank's part.
    """
    n = num_weights(view.node)
    if len(view.inputs) != n + 5:
        return []
    tokens = Strategy((0, 0, 0, 0, *(R,) * n, 0), (0, 0, *(P,) * n))
    experts = Strategy((R, R, R, R, *(0,) * n, P), (P, P, *(0,) * n), lowering="own_experts_backward")
    everywhere = (0,) * (n + 5), (0,) * (n + 2)
    dispatched = Strategy(*everywhere, lowering=f"{_DISPATCH}_backward", of_experts=True)
    return [tokens, experts, dispatched]


_FORWARD, _BACKWARD = torch.ops.shardwright.expert_mlp, torch.ops.shardwright.expert_mlp_backward
RULES[_FORWARD] = expert_mlp
RULES[_BACKWARD] = expert_mlp_backward
