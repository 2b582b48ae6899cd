"""Local shapes, types and strides of every value of a rewritten graph, and which values share memory."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .formats import in_format, in_order
from .gradients import product_into, rows_into
from .loss import cross_entropy_backward

c10d = torch.ops._c10d_functional
# Namespaces whose schemas tell which results share memory with arguments; a user's own op may hand one back unsaid.
_TRUSTED = ("aten", "prims", "shardwright", "_c10d_functional")
# functions of the passes -> positions of the arguments in whose memory their result lies
_OWN_FUNCTIONS: dict[Any, tuple[int, ...]] = {
    operator.getitem: (0,),
    in_format: (0,),
    in_order: (0,),
    cross_entropy_backward: (),
    product_into: (0,),
    rows_into: (0,),
}


def propagate(graph: fx.Graph, placeholders: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put a fake value on each node's meta["val"]. placeholders: shape and type of each by name, as on this rank."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node in graph.nodes:
            if node.op == "placeholder" and node.name in placeholders:
                given = placeholders[node.name]
                node.meta["val"] = torch.empty(given.shape, dtype=given.dtype, device=device)
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = _value(node.target, args, kwargs)


def _value(op: Any, args: Any, kwargs: Any) -> Any:
    """Collectives need no process group for this."""
    if op is operator.getitem:
        return args[0][args[1]]
    if op is c10d.all_reduce.default:
        return torch.empty_like(args[0])
    if op is c10d.wait_tensor.default:
        return args[0]
    if op in _FIRST_SIZE:
        return args[0].new_empty(_FIRST_SIZE[op](*args), *args[0].shape[1:])
    return op(*args, **kwargs)


_FIRST_SIZE: dict[Any, Any] = {
    c10d.all_gather_into_tensor.default: lambda x, parts, group: x.shape[0] * parts,
    c10d.reduce_scatter_tensor.default: lambda x, kind, parts, group: x.shape[0] // parts,
    c10d.all_to_all_single.default: lambda x, out_sizes, in_sizes, group: sum(out_sizes),
}


def memory_roots(graph: fx.Graph) -> dict[fx.Node, frozenset[fx.Node]]:
    """For each node, the nodes that made the memory that its value may lie in."""
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        shared = [n for n in _sharing(node) if n in roots]
        found = frozenset().union(*(roots[n] for n in shared)) if shared else frozenset()
        roots[node] = found | {node} if not shared or _is_foreign(node) else found
    return roots


def _is_foreign(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target not in _OWN_FUNCTIONS and _namespace(node) not in _TRUSTED


def _namespace(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[0] if schema is not None else ""


def _sharing(node: fx.Node) -> list[fx.Node]:
    """Operands whose memory a result may lie in."""
    if node.op != "call_function":
        return []
    if node.target in _OWN_FUNCTIONS:
        return [node.args[k] for k in _OWN_FUNCTIONS[node.target]]  # type: ignore[misc]
    if node.target is c10d.wait_tensor.default:
        return [node.args[0]]  # type: ignore[list-item]
    if _is_foreign(node):
        return node.all_input_nodes
    schema = node.target._schema  # type: ignore[union-attr]
    if node.target is torch.ops.aten._unsafe_view.default:  # a view, whatever its schema says
        return [node.args[0]]  # type: ignore[list-item]
    if not any(result.alias_info for result in schema.returns):
        return []
    found: list[fx.Node] = []
    for k, argument in enumerate(schema.arguments):
        if argument.alias_info is not None:
            value: Any = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name)
            fx.node.map_arg(value, found.append)
    return found
