"""Sharding rules of aten ops on one mesh axis: for each op, all the ways in which ranks can share its work.

A rule sees an OpView and yields strategies; the all-replicated one is added for every op. RULES maps each op (all
overloads) to its rule; ops tagged pointwise need no entry. The other rules stand in view_rules.py, math_rules.py,
lookup_rules.py, expert_rules.py, recurrence_rules.py and scan_rules.py. Ops without one are looked up in DTensor's own
(dtensor_rules.py), then planned replicated and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..profiler.op_view import OpView
from .placement import P, R
from .strategy import Strategy

aten = torch.ops.aten
Rule = Callable[[OpView], Iterable[Strategy]]
RULES: dict[Any, Rule] = {}


def rule_for(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[getattr(aten, name)] = rule
        return rule

    return register


def find_rule(op: Any) -> Rule | None:
    if not isinstance(op, torch._ops.OpOverload):
        return None
    if op.overloadpacket in RULES:
        return RULES[op.overloadpacket]
    if torch.Tag.pointwise in op.tags and not op._schema.is_mutable:
        return pointwise
    return None


def same_everywhere(view: OpView, dims: Iterable[int]) -> list[Strategy]:
    """Every tensor operand and result split on the same dimension."""
    return [Strategy((d,) * len(view.inputs), (d,) * len(view.outputs)) for d in dims]


def wrap(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


# --------------------------------------------------------------------------- pointwise
# ops through which a partial sum passes: linear in the operands listed (positions among tensor operands), others whole
_LINEAR_UNARY = {
    "neg",
    "clone",
    "_to_copy",
    "alias",
    "detach",
    "mul.Scalar",
    "div.Scalar",
    "contiguous",
    "real",
    "imag",
}
_LINEAR_FIRST = {"silu_backward", "gelu_backward", "threshold_backward", "tanh_backward", "sigmoid_backward",
                 "native_dropout_backward", "hardtanh_backward", "leaky_relu_backward", "elu_backward",
                 "hardswish_backward", "softplus_backward", "div", "mish_backward", "hardsigmoid_backward",
                 "softshrink_backward", "hardshrink_backward"}  # fmt: skip


def pointwise(view: OpView) -> list[Strategy]:
    """Any output dimension; operands that are broadcast along it stay whole. Partial sums through linear ops."""
    out = next(o for o in view.outputs if o is not None)
    rank = out.dim()
    found = []
    for d in range(rank):
        places = []
        for t in view.inputs:
            own = d - (rank - t.dim())
            places.append(own if own >= 0 and t.shape[own] == out.shape[d] and out.shape[d] > 1 else R)
        if out.shape[d] > 1:
            found.append(Strategy(tuple(places), (d,) * len(view.outputs)))
    name = view.op._schema.name.split("::")[1]
    full = f"{name}.{view.op._overloadname}"
    count = len(view.inputs)
    if not out.is_floating_point():
        return found
    widening = all(t.is_floating_point() and t.dtype.itemsize <= out.dtype.itemsize for t in view.inputs)
    if count == 1 and widening and (name in _LINEAR_UNARY or full in _LINEAR_UNARY or _by_number(view, name)):
        found.append(Strategy((P,), (P,)))
    elif count == 2 and name in ("add", "sub"):
        found.append(Strategy((P, P), (P,)))
    elif count == 2 and name == "mul":
        found += [Strategy((P, R), (P,)), Strategy((R, P), (P,))]
    elif count >= 2 and name in _LINEAR_FIRST and not view.kwargs.get("rounding_mode"):
        found.append(Strategy((P,) + (R,) * (count - 1), (P,)))
    elif name == "where" and count == 3:
        found.append(Strategy((R, P, P), (P,)))
    return found


for _untagged in (
    "softplus_backward", "masked_fill", "floor_divide", "log_sigmoid_backward", "polar", "elu_backward",
    "mish_backward", "hardsigmoid_backward", "hardswish", "hardswish_backward", "softshrink_backward",
    "hardshrink_backward", "_prelu_kernel", "_prelu_kernel_backward", "fill", "complex", "log_sigmoid_forward",
    "isclose",
):  # fmt: skip
    RULES[getattr(aten, _untagged)] = pointwise
RULES[aten._to_copy] = pointwise  # not tagged so in every torch; DTensor's rule would round the parts of a sum


def _by_number(view: OpView, name: str) -> bool:
    """x * 2 and x / 2 are linear; 2 / x is not."""
    if name == "mul":
        return True
    return name == "div" and isinstance(view.args[0], torch.fx.Node) and not view.kwargs.get("rounding_mode")
