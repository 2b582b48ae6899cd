"""The tanh form of GELU as one operator, in a captured forward graph.

    x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))        (Hendrycks and Gimpel, arXiv:1606.08415, section 2)

becomes aten.gelu(x, approximate="tanh"): one kernel, and x alone kept for the backward where the formula keeps four
tensors of its size. It is found however it is spelled, by its values: elementwise ops and numbers between x and the
result, evaluated on sample points. In less than float32 each op of the formula rounds, and the graph is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
GELU = aten.gelu.default
TOLERANCE = 1e-10  # relative; the root is often written with ten digits
_MAX_DEPTH = 6  # ops between x, or the result, and the hyperbolic tangent

_EVALUATE: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: lambda a, b: a + b,
    aten.add.Scalar: lambda a, b: a + b,
    aten.mul.Tensor: lambda a, b: a * b,
    aten.mul.Scalar: lambda a, b: a * b,
    aten.div.Tensor: lambda a, b: a / b,
    aten.div.Scalar: lambda a, b: a / b,
    aten.pow.Tensor_Scalar: lambda a, b: a**b,
    aten.square.default: lambda a: a * a,
    aten.tanh.default: torch.tanh,
}


def fuse_gelu(graph: fx.Graph) -> int:
    """In place, for every GELU found; nodes carry meta["val"]. Returns how many there were."""
    found = [pair for pair in map(_match, list(graph.nodes)) if pair is not None]
    for x, result in found:
        with graph.inserting_before(result):
            fused = graph.call_function(GELU, (x,), {"approximate": "tanh"})
        fused.meta = dict(result.meta)
        result.replace_all_uses_with(fused)
    graph.eliminate_dead_code()
    return len(found)


def _match(tanh: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, result) of the GELU around this hyperbolic tangent."""
    if tanh.target is not aten.tanh.default or not _is_wide(tanh):
        return None
    points = torch.linspace(-4, 4, 41, dtype=torch.float64)
    expected = torch.nn.functional.gelu(points, approximate="tanh")
    for x in _near(tanh, lambda node: node.all_input_nodes):
        for result in _near(tanh, lambda node: list(node.users)):
            value = _evaluate(result, x, points)
            if value is not None and torch.allclose(value, expected, rtol=TOLERANCE, atol=1e-13):
                return x, result
    return None


def _is_wide(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float64)


def _near(start: fx.Node, next_to: Callable[[fx.Node], list[fx.Node]]) -> list[fx.Node]:
    """Nodes of the same shape and dtype, a few elementwise ops away, nearest first."""
    found: dict[fx.Node, None] = {}
    edge = [start]
    for _ in range(_MAX_DEPTH):
        edge = [
            n for node in edge if node is start or node.target in _EVALUATE for n in next_to(node) if n not in found
        ]
        found |= dict.fromkeys(node for node in edge if _alike(node, start))
    return list(found)


def _alike(node: fx.Node, other: fx.Node) -> bool:
    value, wanted = node.meta.get("val"), other.meta["val"]
    return isinstance(value, torch.Tensor) and value.shape == wanted.shape and value.dtype == wanted.dtype


def _evaluate(node: Any, x: fx.Node, points: torch.Tensor) -> Any:
    """The value of a node as a function of x alone; None where it is none."""
    if not isinstance(node, fx.Node):
        return node if isinstance(node, (int, float)) else None
    if node is x:
        return points
    if node.target not in _EVALUATE or node.kwargs:
        return None
    values = [_evaluate(operand, x, points) for operand in node.args]
    return None if any(value is None for value in values) else _EVALUATE[node.target](*values)
