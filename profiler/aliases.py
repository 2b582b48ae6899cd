"""Which ops of a captured graph give another view of memory, and how a view's new value is put back into the whole.

part of a tensor    slice, narrow, select, split, chunk, unbind, diagonal: the op's own scatter
all of it           transpose, permute, reshape and their like: the inverse, in the whole's shape
the same            detach, alias, and what changes nothing: the value itself
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..errors import ExitCode, ShardwrightError
from .nodes import source_of, value

aten = torch.ops.aten
_SAME = {aten.detach, aten.alias, aten.lift_fresh, aten.to, aten.type_as, aten.contiguous, aten.dropout,
         aten.feature_dropout, aten.alpha_dropout, aten.expand_as, aten.expand, aten.positive, aten.resolve_conj,
         aten.resolve_neg}  # fmt: skip
_RESHAPED = {aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.view_as, aten.reshape_as,
             aten.unsqueeze, aten.squeeze, aten._reshape_alias}  # fmt: skip
_ORDERED = {aten.transpose, aten.permute, aten.t, aten.movedim, aten.moveaxis, aten.swapaxes, aten.swapdims,
            aten.numpy_T, aten.mT, aten.adjoint}  # fmt: skip
_PARTS = {aten.slice: aten.slice_scatter.default, aten.select: aten.select_scatter.default,
          aten.diagonal: aten.diagonal_scatter.default}  # fmt: skip
_MANY = {aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unbind, aten.unsafe_split,
         aten.unsafe_chunk}  # fmt: skip


def packet_of(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def makes_many(node: fx.Node) -> bool:
    return packet_of(node) in _MANY


def is_view(node: fx.Node) -> bool:
    """Is the result, one tensor, in the memory of the first operand?"""
    packet, source = packet_of(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(value(node), torch.Tensor):
        return False
    if node.target is operator.getitem:
        return makes_many(source)
    if packet in (aten.dropout, aten.feature_dropout, aten.alpha_dropout):
        return bool(not node.args[2] or node.args[1] == 0)  # such a one hands its input on
    before, after = value(source), value(node)
    if not isinstance(before, torch.Tensor):
        return False
    if packet in (aten.reshape, aten.flatten, aten.reshape_as):
        return _views(before, after)
    if packet in (aten.contiguous, aten.to, aten.type_as):
        return before.dtype == after.dtype and before.device == after.device and before.stride() == after.stride()
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return packet in _RESHAPED or any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _views(before: torch.Tensor, after: torch.Tensor) -> bool:
    try:
        torch.empty_strided(before.shape, before.stride(), device="meta").view(after.shape)
    except RuntimeError:
        return False
    return True


def seen_again(graph: fx.Graph, view: fx.Node, source: fx.Node) -> fx.Node:
    """The same view of a new value."""
    if view.target is operator.getitem:
        many: Any = view.args[0]
        both = graph.call_function(many.target, (source, *many.args[1:]), dict(many.kwargs))
        both.meta = dict(many.meta)
        new = graph.call_function(operator.getitem, (both, view.args[1]))
    else:
        new = graph.call_function(view.target, (source, *view.args[1:]), dict(view.kwargs))  # type: ignore[arg-type]
    new.meta = dict(view.meta)
    return new


def put_back(graph: fx.Graph, view: fx.Node, whole: fx.Node, new: fx.Node) -> fx.Node:
    """`whole`, with the part or form of it that `view` shows replaced by `new`."""
    packet, before, after = packet_of(view), value(whole), value(view)

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(op, args, kwargs)
        made.meta = {
            **{k: v for k, v in new.meta.items() if k != "random"},
            "val": before,
        }  # the new part may be a draw
        return made

    if packet in _SAME and before.shape == after.shape and not (packet is aten.detach and before.requires_grad):
        return new
    if packet in _RESHAPED:
        return call(aten.reshape.default, new, list(before.shape))
    if packet in _ORDERED:
        return call(aten.permute.default, new, _inverse(view, before))
    if packet in _PARTS:
        return call(_PARTS[packet], whole, new, *view.args[1:], **view.kwargs)
    if packet is aten.narrow:
        dim, start, length = view.args[1:4]
        return call(aten.slice_scatter.default, whole, new, dim, start, start + length)  # type: ignore[operator]
    if view.target is operator.getitem:
        return _put_one_of_many(view, whole, new, call)
    raise ShardwrightError(
        f"{source_of(view) or 'the model'} writes through {view.target}",
        means="what else the write changes cannot be followed in a graph",
        change="that line: write to the tensor itself, or to a slice of it",
        works="x = torch.where(mask, new, x)",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


def _inverse(view: fx.Node, before: torch.Tensor) -> list[int]:
    """The permutation back, found on sizes that tell dimensions apart."""
    marked = torch.empty([d + 2 for d in range(before.dim())], device="meta")
    order = [size - 2 for size in view.target(marked, *view.args[1:], **view.kwargs).shape]  # type: ignore[operator]
    return [order.index(d) for d in range(before.dim())]


def _put_one_of_many(view: fx.Node, whole: fx.Node, new: fx.Node, call: Any) -> fx.Node:
    many: Any = view.args[0]
    index: Any = view.args[1]
    parts = value(many)
    if packet_of(many) is aten.unbind:
        dim = many.args[1] if len(many.args) > 1 else many.kwargs.get("dim", 0)
        return call(aten.select_scatter.default, whole, new, dim, index)
    position = 2
    dim = many.args[position] if len(many.args) > position else many.kwargs.get("dim", 0)
    sizes = [part.shape[dim] for part in parts]
    start = sum(sizes[:index])
    return call(aten.slice_scatter.default, whole, new, dim, start, start + sizes[index])
