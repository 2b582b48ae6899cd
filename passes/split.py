"""A backward graph as two: the gradients of inputs, which other stages wait for, and those of parameters.

Nothing is computed twice: what both need the first computes and hands on, as memories rather than views. Parameters and
buffers are handed to both anew, so that nothing of them is held in between (Qi et al., arXiv:2401.10241, section 2).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..profiler.nodes import needed_for
from ..profiler.slots import LASTING, PARAM, kind_of
from .partition import extract, is_free


@dataclass(frozen=True)
class SplitBackward:
    """inputs(*params, *buffers, key, *saved, *tangents) -> (*input_grads, *carried)
    weights(*params, *buffers, key, *carried) -> param_grads, of which those in into_slots may be written into memory
    that is given after all else. reads_params: whether weights reads any parameter.
    """

    inputs: fx.GraphModule
    weights: fx.GraphModule
    reads_params: bool
    into_slots: tuple[int, ...] = ()


def split_backward(backward: fx.GraphModule, num_params: int) -> SplitBackward:
    placeholders = [node for node in backward.graph.nodes if node.op == "placeholder"]
    both = [node for node in placeholders if kind_of(node.name) in LASTING]
    output: Any = next(node for node in reversed(backward.graph.nodes) if node.op == "output")
    param_grads, input_grads = list(output.args[0][:num_params]), list(output.args[0][num_params:])
    for_inputs = needed_for(input_grads)
    carried: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    stack = [node for node in param_grads if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node in seen or node in both:
            continue
        seen.add(node)
        if node.op == "placeholder" or (_is_made(node, for_inputs) and not is_free(node)):
            carried[node] = None
        else:
            stack.extend(node.all_input_nodes)
    order = {node: k for k, node in enumerate(backward.graph.nodes)}
    handed_on = sorted(carried, key=order.__getitem__)
    inputs = extract(backward, placeholders, [*input_grads, *handed_on])
    weights = extract(backward, [*both, *handed_on], param_grads)
    read = {node.name for node in weights.graph.nodes if node.op == "placeholder" and node.users}
    return SplitBackward(inputs, weights, any(kind_of(name) == PARAM for name in read))


def _is_made(node: fx.Node, for_inputs: set[fx.Node]) -> bool:
    """Is this a tensor that the first graph has? Also another result of an op that it runs."""
    return (node in for_inputs and not _has_several_results(node)) or (
        node.target is operator.getitem and node.args[0] in for_inputs
    )


def _has_several_results(node: fx.Node) -> bool:
    return bool(node.users) and all(user.target is operator.getitem for user in node.users)
