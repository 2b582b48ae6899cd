"""A tensor from one placement to another on one mesh axis, as nodes of a graph: local ops and functional collectives.

Shards are those of torch.chunk, so they may differ in length; collectives then run on padded pieces.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ops.placement import P, R, shard_size, shard_start

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class ExpertWays:
    """How tokens go to experts along an axis. per_host: how many neighbours on it share a host, where a token goes to
    each host once. chunks: in which a rank's tokens go. hop_groups: names of the groups of the ranks in the same place
    on each host, and of those of a host."""

    per_host: int = 1
    chunks: int = 1
    hop_groups: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class MeshAxis:
    """One axis of the mesh as this rank sees it. index: this rank's coordinate. group: name of the process group."""

    name: str
    size: int
    index: int
    group: str
    experts: ExpertWays = ExpertWays()


class Emitter:
    """Appends nodes to a graph, marking each with the phase it belongs to, and with the captured op that it computes:
    "of", its name; "moves", where it only brings a result of it into another placement."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.phase = graph, "forward"
        self.of, self.moves = "", False

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        node.meta["phase"] = self.phase
        node.meta["of"], node.meta["moves"] = self.of, self.moves
        return node

    def wait(self, op: Any, *args: Any) -> fx.Node:
        return self.call(c10d.wait_tensor.default, self.call(op, *args))

    def all_reduce(self, x: fx.Node, axis: MeshAxis, kind: str = "sum") -> fx.Node:
        return self.wait(c10d.all_reduce.default, self.contiguous(x), kind, axis.group)

    def contiguous(self, x: fx.Node) -> fx.Node:
        return self.call(aten.contiguous.default, x)


def redistribute(emit: Emitter, x: fx.Node, shape: Sequence[int], axis: MeshAxis, before: int, after: int) -> fx.Node:
    """shape: sizes of the tensor on this rank, were it whole on the axis."""
    if before == after or axis.size == 1:
        return x
    if before == R:
        return _slice(emit, x, shape, axis, after) if after >= 0 else _keep_on_first(emit, x, axis)
    if before == P:
        return emit.all_reduce(x, axis) if after == R else _reduce_scatter(emit, x, shape, axis, after)
    if after == R:
        return _all_gather(emit, x, shape, axis, before)
    if after == P:
        return _among_zeros(emit, x, shape, axis, before)
    return _all_to_all(emit, x, shape, axis, before, after)


def _slice(emit: Emitter, x: fx.Node, shape: Sequence[int], axis: MeshAxis, dim: int) -> fx.Node:
    start = shard_start(shape[dim], axis.size, axis.index)
    size = shard_size(shape[dim], axis.size, axis.index)
    return _part(emit, x, dim, start, start + size)


def _part(emit: Emitter, x: fx.Node, dim: int, start: int, end: int) -> fx.Node:
    """Contiguous, as ops make their results: the kernels of norms read the statistics handed to their backward so."""
    return emit.contiguous(emit.call(aten.slice.Tensor, x, dim, start, end))


def _keep_on_first(emit: Emitter, x: fx.Node, axis: MeshAxis) -> fx.Node:
    """A whole tensor as a partial sum: one rank has it, the others zeros."""
    return x if axis.index == 0 else emit.call(aten.zeros_like.default, x)


def _among_zeros(emit: Emitter, x: fx.Node, shape: Sequence[int], axis: MeshAxis, dim: int) -> fx.Node:
    """A shard as a partial sum: zeros stand where the other ranks' shards are."""
    start = shard_start(shape[dim], axis.size, axis.index)
    behind = shape[dim] - start - shard_size(shape[dim], axis.size, axis.index)
    return emit.call(aten.constant_pad_nd.default, x, [0, 0] * (len(shape) - 1 - dim) + [start, behind])


def _pad(emit: Emitter, x: fx.Node, rank: int, dim: int, amount: int) -> fx.Node:
    if amount == 0:
        return x
    return emit.call(aten.constant_pad_nd.default, x, [0, 0] * (rank - 1 - dim) + [0, amount])


def _all_gather(emit: Emitter, x: fx.Node, shape: Sequence[int], axis: MeshAxis, dim: int) -> fx.Node:
    chunk = -(-shape[dim] // axis.size)
    x = _pad(emit, x, len(shape), dim, chunk - shard_size(shape[dim], axis.size, axis.index))
    gathered = emit.wait(c10d.all_gather_into_tensor.default, emit.contiguous(x), axis.size, axis.group)
    if dim != 0 and any(s != 1 for s in shape[:dim]):
        gathered = emit.call(aten.cat.default, _pieces(emit, gathered, shape[0], 0, axis.size), dim)
    elif dim != 0:  # only ones before: the pieces already lie one after the other
        gathered = emit.call(aten.reshape.default, gathered, [*shape[:dim], chunk * axis.size, *shape[dim + 1 :]])
    if chunk * axis.size != shape[dim]:  # chunks are full but for the last ones, so padding is all at the end
        gathered = _part(emit, gathered, dim, 0, shape[dim])
    return gathered


def _pieces(emit: Emitter, x: fx.Node, size: int, dim: int, count: int) -> list[fx.Node]:
    """x in so many pieces of this size along dim. Pieces without elements are all alike."""
    if size == 0:
        return [x] * count
    pieces = emit.call(aten.split.Tensor, x, size, dim)
    return [emit.call(operator.getitem, pieces, i) for i in range(count)]


def _reduce_scatter(emit: Emitter, x: fx.Node, shape: Sequence[int], axis: MeshAxis, dim: int) -> fx.Node:
    chunk = -(-shape[dim] // axis.size)
    x = _pad(emit, x, len(shape), dim, chunk * axis.size - shape[dim])
    if dim != 0 and any(s != 1 for s in shape[:dim]):
        x = emit.call(aten.cat.default, _pieces(emit, x, chunk, dim, axis.size), 0)
    elif dim != 0:
        x = emit.call(aten.reshape.default, x, [axis.size, *shape[1:dim], chunk, *shape[dim + 1 :]])
    out = emit.wait(c10d.reduce_scatter_tensor.default, emit.contiguous(x), "sum", axis.size, axis.group)
    if dim != 0 and all(s == 1 for s in shape[:dim]):
        out = emit.call(aten.reshape.default, out, [*shape[:dim], chunk, *shape[dim + 1 :]])
    own = shard_size(shape[dim], axis.size, axis.index)
    return out if own == chunk else _part(emit, out, dim, 0, own)


def _all_to_all(emit: Emitter, x: fx.Node, shape: Sequence[int], axis: MeshAxis, before: int, after: int) -> fx.Node:
    """Split on `after`, exchange, join on `before`: each rank sends piece j to rank j."""
    n = axis.size
    out_chunk, in_chunk = -(-shape[after] // n), -(-shape[before] // n)
    x = _pad(emit, x, len(shape), after, out_chunk * n - shape[after])
    x = _pad(emit, x, len(shape), before, in_chunk - shard_size(shape[before], n, axis.index))
    stacked = emit.call(aten.cat.default, _pieces(emit, x, out_chunk, after, n), 0)
    local = list(shape)
    local[before], local[after] = in_chunk, out_chunk
    sizes = [local[0]] * n
    moved = emit.wait(c10d.all_to_all_single.default, emit.contiguous(stacked), sizes, sizes, axis.group)
    joined = emit.call(aten.cat.default, _pieces(emit, moved, local[0], 0, n), before)
    if in_chunk * n != shape[before]:
        joined = _part(emit, joined, before, 0, shape[before])
    own = shard_size(shape[after], n, axis.index)
    return joined if own == out_chunk else _part(emit, joined, after, 0, own)
