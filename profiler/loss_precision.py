"""Losses of half-precision models in float32, as torch.autocast takes them.

Loss functions, log_softmax and reductions to one number read float32 copies of half-precision operands and give
float32; what follows from them is of the type that torch's promotion makes of it. Where an op wants operands of one
type, it gets them back as it had them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .global_loss import op_name, reduces_all, reduction_of
from .nodes import emit, value

aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


def widen_losses(graph: fx.Graph) -> None:
    """In place."""
    before: dict[fx.Node, torch.dtype] = {}  # nodes that became wider -> what they were
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if _is_loss(node):
            operands = {n for n in node.all_input_nodes if _is_half(value(n))}
            for operand in operands:
                with graph.inserting_before(node):
                    wide = emit(graph, node, aten._to_copy.default, operand, dtype=torch.float32)
                node.replace_input_with(operand, wide)
            if operands or any(n in before for n in node.all_input_nodes):
                _again(graph, node, before)
        elif any(n in before for n in node.all_input_nodes):
            _again(graph, node, before)


def _is_half(val: Any) -> bool:
    return isinstance(val, torch.Tensor) and val.dtype in _HALF


def _is_loss(node: fx.Node) -> bool:
    name = op_name(node)
    if reduction_of(node) is not None or name in ("log_softmax", "_log_softmax"):
        return True
    return name in ("sum", "mean") and value(node.args[0]).numel() > 1 and reduces_all(node)


def _again(graph: fx.Graph, node: fx.Node, before: dict[fx.Node, torch.dtype]) -> None:
    """The node's value, now that some of its operands are wider."""
    old = value(node)
    try:
        new = _computed(node)
    except (RuntimeError, TypeError):  # as a product of matrices of two types
        for operand in [n for n in node.all_input_nodes if n in before]:
            with graph.inserting_before(node):
                narrow = emit(graph, node, aten._to_copy.default, operand, dtype=before[operand])
            node.replace_input_with(operand, narrow)
        new = _computed(node)
    node.meta["val"] = new
    if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor) and new.dtype != old.dtype:
        before[node] = old.dtype
    elif isinstance(new, (tuple, list)):
        before[node] = next((o.dtype for o in old if _is_half(o)), torch.bfloat16)


def _computed(node: fx.Node) -> Any:
    given: Any = (node.args, dict(node.kwargs))
    args, kwargs = fx.node.map_arg(given, value)
    if node.target is operator.getitem:
        return args[0][args[1]]
    tensor = next(v for n in node.all_input_nodes for v in _tensors(value(n)))
    with tensor.fake_mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _tensors(val: Any) -> list[Any]:
    return [t for t in (val if isinstance(val, (tuple, list)) else [val]) if hasattr(t, "fake_mode")]
