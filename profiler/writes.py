"""Writes in a forward, in place of which the rest of the passes see new values. normalize.py says in which order."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from ..errors import ExitCode, ShardwrightError
from .aliases import is_view, makes_many, put_back, seen_again
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
        written = written_memory(node)
        if written is None or written.op != "placeholder" or written.name not in param_placeholders:
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


def refuse_writes_beside_gradients(graph: fx.Graph) -> None:
    """`hidden.data.mul_(2)`, or a write under no_grad to what takes a gradient: eager changes the values and leaves the
    gradient as it was, which no graph of new values says."""
    taking: set[fx.Node] = set()
    for node in graph.nodes:
        beside, written = bool(node.meta.get("without_gradient")), _written(node)
        takes = _takes_gradient(node, taking)
        while written is not None:
            if beside and written in taking and written.op != "placeholder":
                raise _beside_gradients(node)
            if takes and not beside:
                taking.add(written)  # from here on, as what is written to it does
            if not is_view(written):
                break
            beside = beside or written.target is aten.detach.default
            written = written.args[0]  # type: ignore[assignment]
        if takes:
            taking.add(node)


def _takes_gradient(node: fx.Node, taking: Collection[fx.Node]) -> bool:
    """A parameter that is trained, or what is computed of one."""
    if node.op == "placeholder":
        tensor = node.meta.get("val")
        return isinstance(tensor, torch.Tensor) and tensor.requires_grad
    if node.op != "call_function" or node.target is aten.detach.default or node.meta.get("without_gradient"):
        return False
    if _is_of_shape_alone(node.target):
        return False
    made = node.meta.get("val")
    tensors = made if isinstance(made, (tuple, list)) else [made]
    floating = any(isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex()) for t in tensors)
    return floating and any(n in taking for n in node.all_input_nodes)


def _is_of_shape_alone(target: Any) -> bool:
    """zeros_like, new_full, randn_like: of what they are given they read no values, and hand it no gradient."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    name = target._schema.name.removeprefix("aten::")
    return name.endswith("_like") or name.startswith("new_")


def _beside_gradients(node: fx.Node) -> ShardwrightError:
    return ShardwrightError(
        f"{source_of(node) or 'the model'} writes to a tensor that takes a gradient, beside autograd ({node.target})",
        means="PyTorch changes its values and computes gradients as if it had not; a graph has no such write",
        change="that line: write it as an op of the forward, outside no_grad and without .data or .detach()",
        works="h = h.clamp(min=0), or h + (h.clamp(min=0) - h).detach() where gradients are to pass as they are",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


def is_inplace(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    name = target._schema.name.split("::")[1]
    return name in _OF_OPERATORS or (name.endswith("_") and not name.startswith("_") and not name.endswith("__"))


# x |= y and its like
_OF_OPERATORS = {
    "__ior__": "__or__", "__iand__": "__and__", "__ixor__": "__xor__", "__ilshift__": "__lshift__",
    "__irshift__": "__rshift__",
}  # fmt: skip


def _functional(target: Any) -> Any | None:
    """add_.Tensor -> add.Tensor, where it exists with the same overload name; add.out -> add.Tensor."""
    if not is_inplace(target):
        return _without_out(target)
    name = target._schema.name.split("::")[1]
    name = _OF_OPERATORS.get(name, name[:-1])
    if name == "zero":
        return aten.zeros_like.default
    packet = getattr(aten, name, None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _written(node: fx.Node) -> fx.Node | None:
    """The tensor that an op writes to: x of x.add_(y), and of torch.mul(y, z, out=x)."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node) and node.target._schema.is_mutable:
        return out
    return node.args[0] if is_inplace(node.target) and isinstance(node.args[0], fx.Node) else None


def written_memory(node: fx.Node) -> fx.Node | None:
    """The tensor that owns the memory that an op writes to."""
    written = _written(node)
    while written is not None and is_view(written):
        written = written.args[0]  # type: ignore[assignment]
    return written


def _without_out(target: Any) -> Any | None:
    """The overload that makes a new tensor of the same arguments."""
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments if a.name != "out"]
    for name in target.overloadpacket.overloads():
        overload = getattr(target.overloadpacket, name)
        if [(a.name, str(a.type)) for a in overload._schema.arguments] == wanted and not overload._schema.is_mutable:
            return overload
    return None


def replace_inplace(graph: fx.Graph, buffer_placeholders: set[str]) -> dict[str, fx.Node]:
    """x.add_(y) becomes x1 = add(x, y); later readers of x read x1, and views of the same memory are seen again.

    Returns buffers written: name -> new value.
    """
    if not any(_written(node) is not None for node in graph.nodes):
        return {}
    return _Writes(graph).run(buffer_placeholders)


class _Writes:
    """What each value of the original program is now.

    A write makes a new value of the view that it goes through, and of all that the view is a part of, up to the root
    that owns the memory; other views of that root are taken again from its new value when they are next read.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.viewed: dict[fx.Node, fx.Node] = {}  # view, or list of views -> what it is a view of
        self.same: dict[fx.Node, fx.Node] = {}  # in-place op -> what it wrote to and hands on
        self.now: dict[fx.Node, fx.Node] = {}  # who holds the value of a node, as of `seen` writes to its root
        self.seen: dict[fx.Node, int] = {}
        self.writes: dict[fx.Node, int] = {}

    def run(self, buffers: set[str]) -> dict[str, fx.Node]:
        placeholders = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        for node in list(self.graph.nodes):
            if node.op not in ("call_function", "output"):
                continue
            operands = {n: self._fresh(n, node) for n in node.all_input_nodes}
            first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            written = _written(node)
            if written is not None and self._write(node, self._named(written), operands):
                continue
            if first is not None and node.op == "call_function":
                if is_view(node):
                    many = node.target is operator.getitem
                    self.viewed[node] = self.viewed[first] if many else self._named(first)
                elif makes_many(node):
                    self.viewed[node] = self._named(first)
                if node in self.viewed:
                    self.seen[node] = self.writes.get(self._root(node), 0)
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: operands[n])  # noqa: B023
        for node in reversed(self.same):
            self.graph.erase_node(node)
        return {
            name: self.now[placeholders[name]]
            for name in sorted(buffers & placeholders.keys())
            if self.writes.get(placeholders[name])
        }

    def _named(self, node: fx.Node) -> fx.Node:
        while node in self.same:
            node = self.same[node]
        return node

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.viewed:
            node = self.viewed[node]
        return node

    def _fresh(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """Who holds the value that a reader standing here finds."""
        node = self._named(node)
        count = self.writes.get(self._root(node), 0)
        if node not in self.viewed or self.seen[node] == count:
            return self.now.get(node, node)
        if makes_many(node):
            return node  # its parts are seen again one by one
        source = self._fresh(self.viewed[node], reader)
        with self.graph.inserting_before(reader):
            self.now[node], self.seen[node] = seen_again(self.graph, node, source), count
        return self.now[node]

    def _write(self, node: fx.Node, target: fx.Node, operands: dict[fx.Node, fx.Node]) -> bool:
        """False where the op has no form that makes a new tensor: later passes say what they can do with it."""
        functional = _functional(node.target)
        if functional is None:
            return False
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: operands[n])
        kwargs = {name: given for name, given in kwargs.items() if name != "out"}
        chain = [target]
        while chain[-1] in self.viewed:
            chain.append(self.viewed[chain[-1]])
        wholes = [self._fresh(n, node) for n in chain]
        with self.graph.inserting_before(node):
            if node.target is aten.copy_.default:
                new = _copy(self.graph, node, args[1], target)
            else:
                new = _new_value(self.graph, node, functional, args, kwargs, target)
            made = [new]
            for view, whole in zip(chain, wholes[1:], strict=False):
                made.append(put_back(self.graph, view, whole, made[-1]))
        count = self.writes[chain[-1]] = self.writes.get(chain[-1], 0) + 1
        for n, holder in zip(chain, made, strict=True):
            self.now[n], self.seen[n] = holder, count
        self.same[node] = target
        return True


def _new_value(
    graph: fx.Graph, node: fx.Node, functional: Any, args: Any, kwargs: dict[str, Any], target: fx.Node
) -> fx.Node:
    """In the type of what is written to, whatever the op would promote its operands to."""
    if functional is aten.zeros_like.default:
        args, kwargs = args[:1], {}
    new = graph.call_function(functional, args, kwargs)
    new.meta = dict(node.meta)
    dtype = value(target).dtype
    others = [value(n).dtype for n in node.all_input_nodes if isinstance(value(n), torch.Tensor) and n is not target]
    if any(other != dtype and other.is_floating_point for other in others):
        new = graph.call_function(aten._to_copy.default, (new,), {"dtype": dtype})
        new.meta = dict(node.meta)
    return new


def _copy(graph: fx.Graph, node: fx.Node, source: Any, target: fx.Node) -> fx.Node:
    shape, dtype = list(value(target).shape), value(target).dtype
    if isinstance(source, fx.Node) and _is_own(source, node) and value(source).dtype == dtype:
        if list(value(source).shape) == shape:
            return source
    if not isinstance(source, fx.Node):
        new = graph.call_function(aten.full_like.default, (target, source))
    else:
        wide = graph.call_function(aten.expand.default, (source, shape))
        wide.meta = {**node.meta, "val": value(source).expand(shape)}
        new = graph.call_function(aten._to_copy.default, (wide,), {"dtype": dtype})
    new.meta = dict(node.meta)
    return new


def _is_own(source: fx.Node, copy: fx.Node) -> bool:
    """Made by an op, and read by the copy alone: it can stand for the value that is written."""
    return source.op == "call_function" and list(source.users) == [copy] and not is_view(source)
