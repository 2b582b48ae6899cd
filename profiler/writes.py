"""Writes in a forward, in place of which the rest of the passes see new values. normalize.py says in which order."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from ..errors import ExitCode, ShardwrightError
from .nodes import source_of, value

aten = torch.ops.aten

_NEW = {aten.empty.memory_format, aten.empty_strided.default, aten.zeros.default, aten.ones.default, aten.full.default}
_SCALINGS = {aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar}


def drop_unread_writes(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users or not is_inplace(node.target):
            continue
        written, last = node.args[0], node
        while isinstance(written, fx.Node) and list(written.users) == [last] and written.target is aten.detach.default:
            written, last = written.args[0], written
        if isinstance(written, fx.Node) and list(written.users) == [last] and written.target in _NEW:
            graph.erase_node(node)


def refuse_param_writes(graph: fx.Graph, param_placeholders: Collection[str]) -> None:
    """A parameter that the forward changes would be another one from step to step, and its gradient that of neither."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or not is_inplace(node.target):
            continue
        written = node.args[0]
        while isinstance(written, fx.Node) and _is_view(written):
            written = written.args[0]
        if not isinstance(written, fx.Node) or written.op != "placeholder" or written.name not in param_placeholders:
            continue
        if node.target in _SCALINGS and node.args[1] in (1, 1.0):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        raise ShardwrightError(
            f"{source_of(node) or 'the model'} writes to a parameter in its forward ({node.target})",
            means="the parameter would change from step to step beside the optimizer, and have no gradient of its own",
            change="that line: compute with a changed copy, or keep the tensor as a buffer",
            works="weight = self.weight / scale",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )


def is_inplace(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    name = target._schema.name.split("::")[1]
    return name.endswith("_") and not name.startswith("_") and not name.endswith("__")


def _functional(target: Any) -> Any | None:
    """add_.Tensor -> add.Tensor, where it exists with the same overload name."""
    packet = getattr(aten, target._schema.name.split("::")[1][:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    returns = target._schema.returns
    return (
        any(r.alias_info is not None and not r.alias_info.is_write for r in returns) or target is aten.reshape.default
    )


def _has_views(node: fx.Node) -> bool:
    """May another node alias this one? True for views of it and where it is itself a view."""
    return _is_view(node) or any(_is_view(user) for user in node.users)


def replace_inplace(graph: fx.Graph, buffer_placeholders: set[str]) -> dict[str, fx.Node]:
    """x.add_(y) becomes x1 = add(x, y), later readers of x read x1. Returns buffers written: name -> new value."""
    mutated: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_inplace(node.target):
            continue
        target, functional = node.args[0], _functional(node.target)
        if functional is None or not isinstance(target, fx.Node) or _has_views(target):
            continue  # left to functionalization inside the segment
        origin = next((name for name, new in mutated.items() if new is target), target.name)
        if node.target is aten.copy_.default:
            new = _copy(graph, node, target)
        else:
            with graph.inserting_before(node):
                new = graph.call_function(functional, node.args, dict(node.kwargs))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        order = {n: i for i, n in enumerate(graph.nodes)}
        target.replace_all_uses_with(new, delete_user_cb=lambda user: order[user] > order[node])  # noqa: B023
        graph.erase_node(node)
        if origin in buffer_placeholders:
            mutated[origin] = new
    return mutated


def _copy(graph: fx.Graph, node: fx.Node, target: fx.Node) -> fx.Node:
    with graph.inserting_before(node):
        source = graph.call_function(aten.expand.default, (node.args[1], list(value(target).shape)))
        source.meta = dict(node.meta)
        return graph.call_function(aten._to_copy.default, (source,), {"dtype": value(target).dtype})
