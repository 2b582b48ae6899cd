"""A linear layer and the cross entropy of its rows as one operator, in a captured forward graph.

    loss = cross_entropy(rows of linear(hidden, weight, bias), target)

becomes sums over shardwright::linear_cross_entropy, which takes some rows at a time, where nothing else reads the
logits. Between the two may stand casts to float32 or wider and whatever takes rows as they are: views that keep the
last dimension, slices of others. Those move to hidden. Losses with weights of classes, smoothing or targets that are
probabilities stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..profiler.nodes import emit, value

aten = torch.ops.aten
_NONE, _SUM = 0, 2
_CASTS = {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, torch.ops.prims.convert_element_type.default}
_SAME = {aten.contiguous.default, aten.clone.default, aten.alias.default}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
# (rows, classes, bytes of an element of the loss) -> is it to be taken some rows at a time?
Asked = Callable[[int, int, int], bool]


@dataclass(frozen=True)
class _Found:
    """between: what takes rows from the linear layer to the loss, in order."""

    linear: fx.Node
    between: tuple[fx.Node, ...]
    loss: fx.Node


def fuse_linear_losses(graph: fx.Graph, asked: Asked) -> int:
    """In place; nodes carry meta["val"]. Returns how many there were."""
    found = [match for match in map(_match, list(graph.nodes)) if match is not None]
    count = 0
    for match in found:
        rows, classes = value(match.loss.args[0]).shape
        if asked(rows, classes, value(match.loss.args[0]).element_size()):
            _fuse(graph, match)
            count += 1
    if count:
        graph.eliminate_dead_code()
    return count


def _match(loss: fx.Node) -> _Found | None:
    if loss.target is not aten.cross_entropy_loss.default:
        return None
    defaults: list[Any] = [None, 1, -100, 0.0]
    given: list[Any] = [*loss.args, *defaults[len(loss.args) - 2 :]]
    logits, target, weight, reduction, _, smoothing = given
    dtype = value(logits).dtype
    is_plain = weight is None and not smoothing and reduction in (_NONE, _SUM) and not loss.kwargs
    if not is_plain or value(logits).dim() != 2 or value(target).is_floating_point():
        return None
    if dtype not in (torch.float32, torch.float64):
        return None
    between: list[fx.Node] = []
    node: Any = logits
    while node.target is not aten.linear.default:
        if not _takes_rows(node) or len(node.users) > 1:
            return None
        between.append(node)
        node = node.args[0]
    if len(node.users) > 1 or value(node).dtype != value(node.args[0]).dtype:
        return None
    return _Found(node, tuple(reversed(between)), loss)


def _takes_rows(node: fx.Node) -> bool:
    """Does it leave the last dimension alone, and no number less exact?"""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = value(node.args[0]), value(node)
    if not isinstance(before, torch.Tensor) or before.shape[-1:] != after.shape[-1:] or before.dim() == 0:
        return False
    if node.target in _CASTS:
        return after.dtype in (torch.float32, torch.float64) and before.dtype.itemsize <= after.dtype.itemsize
    if node.target is aten.slice.Tensor:
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        return int(dim) % before.dim() != before.dim() - 1
    return node.target in _SAME or node.target in _RESHAPES


def _fuse(graph: fx.Graph, found: _Found) -> None:
    loss, dtype = found.loss, value(found.loss.args[0]).dtype
    hidden, weight = found.linear.args[:2]
    bias = found.linear.args[2] if len(found.linear.args) > 2 else None
    _, target, _, reduction, ignore = [*loss.args, *[None, 1, -100][len(loss.args) - 2 :]][:5]
    with graph.inserting_before(loss):
        for node in found.between:
            if node.target in _RESHAPES:
                shape = [*value(node).shape[:-1], value(hidden).shape[-1]]
                hidden = emit(graph, node, aten.reshape.default, hidden, shape)
            elif node.target is aten.slice.Tensor:
                hidden = emit(graph, node, node.target, hidden, *node.args[1:])
        both = emit(graph, loss, linear_cross_entropy, hidden, weight, bias, target, ignore, dtype)
        rows = _item(graph, loss, both, 0)
        result = rows if reduction == _NONE else emit(graph, loss, aten.sum.default, rows)
    loss.replace_all_uses_with(result)
    graph.erase_node(loss)


def _item(graph: fx.Graph, like: fx.Node, node: fx.Node, number: int) -> fx.Node:
    new = graph.call_function(operator.getitem, (node, number))
    new.meta = {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta", "random")}
    new.meta["val"] = value(node)[number]
    return new
