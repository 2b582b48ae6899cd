"""Write results over operands that nothing reads any more: fewer buffers to allocate, fewer bytes to move.

An elementwise op may write over an operand of its result's shape, type and strides, a product that adds to a matrix
over that matrix, an all-reduce over its input. The operand's memory must have been made by the graph itself (never a
parameter, an input or a kept tensor of someone else's), and no value that may share it (values.memory_roots) may be
read later.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from ..ops.in_place import IN_PLACE, OUT_OF_GRADIENT, may_write_over
from .formats import same_strides
from .loss import cross_entropy_backward
from .values import memory_roots


def reuse(graph: fx.Graph, owned: Collection[str] = ()) -> None:
    """Rewrite in place. owned: placeholders whose memory may be written over once nothing reads it."""
    roots = memory_roots(graph)
    place = {node: k for k, node in enumerate(graph.nodes)}
    last: dict[fx.Node, int] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            for root in roots[operand]:
                last[root] = max(last.get(root, 0), len(place) if node.op == "output" else place[node])
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for position in _candidates(node):
            operand = node.args[position]
            if isinstance(operand, fx.Node) and _may_write(node, operand, roots, last, place, owned):
                _write_over(node, position)
                (root,) = roots[operand]
                own, roots[node] = roots[node], roots[operand]
                last[root] = max(last[root], *(last.get(r, 0) for r in own))
                for other, shared in roots.items():  # views of the result are views of the operand's memory now
                    if shared & own and other is not node:
                        roots[other] = (shared - own) | roots[operand]
                break


def _candidates(node: fx.Node) -> tuple[int, ...]:
    if node.target is cross_entropy_backward:  # a row at a time, which only the kernels of CPUs promise
        return (1,) if node.meta["val"].device.type == "cpu" else ()
    return may_write_over(node.target, bool(node.kwargs))


def _may_write(
    node: fx.Node,
    operand: fx.Node,
    roots: dict[fx.Node, frozenset[fx.Node]],
    last: dict[fx.Node, int],
    place: dict[fx.Node, int],
    owned: Collection[str],
) -> bool:
    if len(roots[operand]) != 1:
        return False
    (root,) = roots[operand]
    if root.op == "placeholder" and root.name not in owned:
        return False
    others = [n for n in node.all_input_nodes if n is not operand]
    if last[root] != place[node] or any(root in roots[other] for other in others) or _repeats(node, operand):
        return False
    before, after = operand.meta["val"], node.meta["val"]
    # as the result would lie, so that readers find it in the format that they would have had
    return before.dtype == after.dtype and same_strides(before, after) and _has_own_elements(before)


def _has_own_elements(tensor: torch.Tensor) -> bool:
    """No two indices lead to the same memory, as they do in expanded tensors and sliding windows."""
    reach = 0  # of the dimensions of smaller stride, in elements
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


def _repeats(node: fx.Node, operand: fx.Node) -> bool:
    return sum(argument is operand for argument in node.args) > 1


def _write_over(node: fx.Node, position: int) -> None:
    if node.target is cross_entropy_backward:
        node.args = (*node.args[:6], True)
        return
    if node.target in OUT_OF_GRADIENT:
        node.target, name = OUT_OF_GRADIENT[node.target]
        node.kwargs = {**node.kwargs, name: node.args[0]}
        return
    node.target = IN_PLACE[node.target][0]
    if position:
        node.args = (node.args[1], node.args[0], *node.args[2:])
