"""One op of a captured graph written out as a function's own ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from .nodes import value
from .random_forms import bind


def expand(graph: fx.Graph, node: fx.Node, function: Callable[[dict[str, Any]], torch.Tensor]) -> fx.Node:
    """function: of the op's arguments by name, tensors as such. Returns the node of its result, before `node`.

    Ops are those that autograd still sees, so that the result is differentiated as eager would.
    """
    operands = list(dict.fromkeys(node.all_input_nodes))

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(operands, tensors, strict=True))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: given[n])
        return function(bind(node.target, args, kwargs))  # type: ignore[arg-type]

    with torch.no_grad():
        traced = make_fx(run, tracing_mode="real")(*(value(n) for n in operands))
    kept = {k: v for k, v in node.meta.items() if k != "tensor_meta"}
    return splice(graph, node, traced, operands, lambda new: new.meta.update(kept))


def splice(
    graph: fx.Graph,
    before: fx.Node,
    traced: fx.GraphModule,
    operands: Sequence[fx.Node],
    mark: Callable[[fx.Node], None],
) -> fx.Node:
    """Copy a traced graph to the place before a node; returns its result. mark: gives each copy its meta but "val"."""
    placeholders = iter(operands)
    env: dict[fx.Node, Any] = {}
    with graph.inserting_before(before):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(placeholders)
            elif inner.op == "output":
                return env[inner.args[0]]
            else:
                new = graph.node_copy(inner, lambda n: env[n])
                new.meta = {}
                mark(new)
                new.meta["val"] = inner.meta["val"]
                env[inner] = new
    raise AssertionError("a traced graph ends in its output")
