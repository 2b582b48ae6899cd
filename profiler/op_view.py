"""How an op of a captured graph is looked at: its tensor operands and results, and whose memory a result is."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .work import is_view


@dataclass(frozen=True)
class OpView:
    """What a rule sees of a node: the op, its arguments with tensors as shapes, and its results."""

    node: fx.Node
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: tuple[fx.Node, ...]  # tensor operands in order of appearance, repeated when used twice
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor | None, ...]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(t.shape) for t in self.inputs]


def operands_of(node: fx.Node) -> list[fx.Node]:
    """Tensor operands in the order of the op's arguments, with repeats."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) if _is_tensor(n) else None)
    return found


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def view_of(node: fx.Node) -> OpView:
    operands = tuple(operands_of(node))
    val = node.meta.get("val")
    outputs = tuple(val) if isinstance(val, (tuple, list)) else (val,)
    return OpView(
        node, node.target, tuple(node.args), dict(node.kwargs), operands, tuple(n.meta["val"] for n in operands),
        tuple(o if isinstance(o, torch.Tensor) else None for o in outputs),
    )  # fmt: skip


def is_op(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is not operator.getitem


def origin(node: fx.Node) -> tuple[fx.Node, int]:
    """The op behind a getitem, and which of its results it is."""
    if node.op == "call_function" and not is_op(node):
        return node.args[0], int(node.args[1])  # type: ignore[return-value, arg-type]
    return node, 0


def storage_root(node: fx.Node) -> tuple[fx.Node, int]:
    """The op that owns the memory of a result: views belong to what they view."""
    source, output = origin(node)
    while is_op(source) and is_view(source) and isinstance(source.args[0], fx.Node):
        source, output = origin(source.args[0])
    return source, output
