"""How a forward that writes a buffer makes the new value from the old one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .graph import Segment
from .slots import BUFFER, slot_name

aten = torch.ops.aten
_SUMS = (aten.add.Tensor, aten.add.Scalar)
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_COPIES = (aten.clone.default, aten.detach.default, aten.alias.default)


def update_scales(segment: Segment) -> dict[int, float | None]:
    """Written buffer slot -> a, where its new value is a times the old one and a part that does not depend on it, as
    the running statistics of BatchNorm are. None where it is not, or where anything else depends on the buffer."""
    outputs: tuple[Any, ...] = next(n for n in reversed(segment.joint.graph.nodes) if n.op == "output").args[0]
    placeholders = {node.name: node for node in segment.joint.graph.nodes if node.op == "placeholder"}
    first = len(segment.outputs)
    scales: dict[int, float | None] = {}
    for position, slot in enumerate(segment.mutated_buffers, start=first):
        buffer = placeholders[slot_name(BUFFER, slot)]
        dependent = _behind(buffer)
        read = any(isinstance(n, fx.Node) and n in dependent for k, n in enumerate(outputs) if k != position)
        scales[slot] = None if read else _scale(outputs[position], buffer, dependent)
    return scales


def _behind(buffer: fx.Node) -> set[fx.Node]:
    found, stack = {buffer}, [buffer]
    while stack:
        for user in stack.pop().users:
            if user not in found and user.op != "output":
                found.add(user)
                stack.append(user)
    return found


def _scale(node: Any, buffer: fx.Node, dependent: set[fx.Node]) -> float | None:
    if node is buffer:
        return 1.0
    if node not in dependent:
        return 0.0
    if node.target in _COPIES:
        return _scale(node.args[0], buffer, dependent)
    if node.target in _SUMS and not node.kwargs:
        parts = [_scale(arg, buffer, dependent) for arg in node.args]
        return None if None in parts else sum(part for part in parts if part is not None)
    if node.target in _PRODUCTS and isinstance(node.args[1], (int, float)):
        part = _scale(node.args[0], buffer, dependent)
        return None if part is None else part * node.args[1]
    return None
