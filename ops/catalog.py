"""All strategies of a node on an axis: from our rules, the kernels' table, DTensor's rules; else replicated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..kernels.sharding import SHARDING_RULES
from ..profiler.op_view import OpView, view_of
from . import (  # noqa: F401  each adds its rules to RULES
    expert_rules,
    linalg_rules,
    lookup_rules,
    loss_rules,
    math_rules,
    recurrence_rules,
    scan_rules,
    view_rules,
)
from .attention_rules import is_attention, of_sequence
from .dtensor_rules import dtensor_strategies
from .placement import P, R, can_shard
from .rules import RULES, find_rule
from .strategy import Strategy, replicated

__all__ = ["CUSTOM", "RULES", "fits", "place_of", "strategies"]

CUSTOM: dict[Any, Callable[[OpView], list[Strategy]]] = {}


def strategies(node: fx.Node) -> tuple[list[Strategy], bool]:
    """Every strategy that is valid for the shapes at hand, whatever the axis size; and whether a rule was found."""
    view = view_of(node)
    rule = CUSTOM.get(node.target) or find_rule(node.target)
    if rule is not None:
        found, known = list(rule(view)), True
    elif node.target in SHARDING_RULES:
        found, known = _from_kernels(view), True
        if is_attention(node):
            found += of_sequence(view, found)
    else:
        listed = dtensor_strategies(view)
        found, known = listed or [], listed is not None
    unique = dict.fromkeys([replicated(view), *found])
    return [s for s in unique if _well_formed(s, view)], known


def _well_formed(strategy: Strategy, view: OpView) -> bool:
    if len(strategy.inputs) != len(view.inputs) or len(strategy.outputs) != len(view.outputs):
        return False
    for place, tensor in zip(strategy.inputs, view.inputs, strict=True):
        if place >= tensor.dim() or (place == P and not tensor.is_floating_point()):
            return False
    return all(out is None or place < out.dim() for place, out in zip(strategy.outputs, view.outputs, strict=True))


def _from_kernels(view: OpView) -> list[Strategy]:
    """The kernels' table speaks DTensor's placements: (outputs..., operands...)."""
    count = len(view.outputs)
    found = []
    for row in SHARDING_RULES[view.op](view.args, view.kwargs, view.outputs):
        places = tuple(place_of(p) for p in row)
        if None not in places:
            found.append(Strategy(places[count:], places[:count], even=row.even))  # type: ignore[arg-type]
    return found


def place_of(placement: object) -> int | None:
    """DTensor's placement as ours; None for kinds that we do not use (partial maxima, strided shards)."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if type(placement) is Shard:
        return placement.dim
    if isinstance(placement, Replicate) or placement is None:
        return R
    if type(placement) is Partial and placement.reduce_op == "sum":
        return P
    return None


def fits(strategy: Strategy, view: OpView, parts: int, allowed: Callable[[torch.Tensor, int], bool]) -> bool:
    """Can the strategy run with `parts` ranks? allowed(tensor, dim) is the axis's own condition."""
    tensors = [*zip(strategy.inputs, view.inputs, strict=True), *zip(strategy.outputs, view.outputs, strict=True)]
    for place, tensor in tensors:
        if place >= 0 and tensor is not None:
            if not can_shard(tensor.shape[place], parts, strategy.even) or not allowed(tensor, place):
                return False
    return True
