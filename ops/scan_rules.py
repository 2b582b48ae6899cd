"""How shardwright::scan splits: by samples, or by heads (channels), which do not see each other."""

from __future__ import annotations

import torch

from ..profiler import scan_ops
from ..profiler.op_view import OpView
from .placement import P, R
from .rules import RULES
from .strategy import Strategy


def _rows(view: OpView, first: int) -> list[tuple[list[int], list[int], int, bool]]:
    """Of tensor operands from position `first` of the call: placements, those of their gradients, that of the result,
    and whether sizes must divide evenly."""
    function = str(view.args[first + scan_ops.SLOTS])
    kind = scan_ops.kind_of(function)
    slots = view.args[first : first + scan_ops.SLOTS]
    there = [
        (name, dim, node.meta["val"].shape)
        for (name, dim), node in zip(kind.tensors.items(), slots, strict=False)
        if isinstance(node, torch.fx.Node)
    ]
    samples = [0 if name in kind.samples else R for name, _, _ in there]
    rows = [(samples, [0 if place == 0 else P for place in samples], 0, False)]
    heads: list[int] = []
    grouped = False
    sizes = {shape[dim] for _, dim, shape in there if dim is not None}
    for _, dim, shape in there:
        shared = dim is None or (shape[dim] == 1 and sizes != {1})  # one group that all heads share
        heads.append(R if shared or dim is None else dim)
        grouped |= not shared and dim is not None and shape[dim] != max(sizes)
    rows.append((heads, [P if place == R else place for place in heads], kind.heads_of_result, grouped))
    return rows


def scan(view: OpView) -> list[Strategy]:
    return [Strategy(tuple(places), (result,), even) for places, _, result, even in _rows(view, 0)]


def scan_backward(view: OpView) -> list[Strategy]:
    found = []
    for places, grads, result, even in _rows(view, 1):
        given = iter(grads)
        outputs = tuple(R if out is None else next(given) for out in view.outputs)
        found.append(Strategy((result, *places), outputs, even))
    return found


RULES[torch.ops.shardwright.scan] = scan
RULES[torch.ops.shardwright.scan_backward] = scan_backward
