"""Ring attention (arXiv:2310.01889): keys and values go round the ranks, queries stay; results are joined on the way.

In n steps every rank meets every block of keys. Each step's part is joined to what there is by its log-sum-exp; the
next block travels meanwhile. In the backward keys go round again, with the gradients that gather on them, which arrive
at their own rank after n hops.

Causal attention in the order of tokens would leave the first rank idle and keep the last one busy in every step. It
runs in zigzag order instead, inside this op alone: sequences are taken as 2 n parts, of which rank r has the r-th from
the front and the r-th from the back. Tokens are exchanged before, results after; each step is then half a block's work
on every rank: all rows see the front part of an earlier rank's keys, and the back rows all of a later rank's.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .attention_rows import Piece, joined
from .redistribute import Emitter, MeshAxis, c10d

aten = torch.ops.aten
_CAUSAL = 6  # position of the forward's argument
Splits = tuple[list[int], list[int]]  # sizes along dimension 0: of what comes from each rank, of what goes to it


def is_zigzag(num_tokens: int, causal: bool, ranks: int) -> bool:
    return causal and num_tokens % (2 * ranks) == 0


def rotation(axis: MeshAxis, count: int) -> Splits:
    """All to the next rank, all of the rank before."""
    come, go = [0] * axis.size, [0] * axis.size
    come[(axis.index - 1) % axis.size] = go[(axis.index + 1) % axis.size] = count
    return come, go


def to_zigzag(axis: MeshAxis, num_tokens: int) -> Splits:
    """From parts 2 r and 2 r + 1 of 2 n to parts r and 2 n - 1 - r."""
    n, r, part = axis.size, axis.index, num_tokens // (2 * axis.size)
    come, go = [0] * n, [0] * n
    for own in (2 * r, 2 * r + 1):
        go[own if own < n else 2 * n - 1 - own] += part
    for wanted in (r, 2 * n - 1 - r):
        come[wanted // 2] += part
    return come, go


def steps(axis: MeshAxis, num_tokens: int, causal: bool) -> Iterator[Piece | None]:
    """What of the rank's rows meets what of each block of keys that comes by: own, then the rank's before, ..."""
    n, r = axis.size, axis.index
    block = num_tokens // n
    whole, zigzag = range(block), is_zigzag(num_tokens, causal, n)
    yield Piece(whole, whole, causal=causal)
    for step in range(1, n):
        is_earlier = (r - step) % n < r
        if not causal or (is_earlier and not zigzag):
            yield Piece(whole, whole)
        elif not zigzag:
            yield None
        else:
            half = range(block // 2)
            yield Piece(whole, half) if is_earlier else Piece(range(block // 2, block), whole)


class _Ring:
    """One attention on this rank. first: position of the captured op's query."""

    def __init__(self, emit: Emitter, node: fx.Node, axis: MeshAxis, causal: bool, first: int) -> None:
        self.emit, self.axis = emit, axis
        self.num_tokens = node.args[first].meta["val"].shape[2]  # type: ignore[union-attr]
        self.block = self.num_tokens // axis.size
        self.zigzag = is_zigzag(self.num_tokens, causal, axis.size)
        self.steps = list(steps(axis, self.num_tokens, causal))
        self.swaps = 2 * axis.index >= axis.size  # its second part goes to, and comes from, an earlier rank

    def cut(self, x: fx.Node, dim: int, part: range) -> fx.Node:
        if part == range(self.block):
            return x
        return self.emit.call(aten.slice.Tensor, x, dim, part.start, part.stop)

    def start_rotation(self, x: fx.Node) -> fx.Node:
        """x: [2, ...]. What has to be waited for."""
        come, go = rotation(self.axis, 2)
        x = self.emit.contiguous(x)
        return self.emit.call(c10d.all_to_all_single.default, x, come, go, self.axis.group)

    def wait(self, x: fx.Node) -> fx.Node:
        return self.emit.call(c10d.wait_tensor.default, x)

    def there(self, x: fx.Node, rank: int = 4) -> fx.Node:
        return self._exchanged(x, rank, *to_zigzag(self.axis, self.num_tokens), back=False) if self.zigzag else x

    def back(self, x: fx.Node, rank: int = 4) -> fx.Node:
        come, go = to_zigzag(self.axis, self.num_tokens)
        return self._exchanged(x, rank, go, come, back=True) if self.zigzag else x

    def _exchanged(self, x: fx.Node, rank: int, come: list[int], go: list[int], back: bool) -> fx.Node:
        """Tokens, dimension 2 of so many, at dimension 0 meanwhile."""
        call, rest = self.emit.call, [d for d in range(rank) if d != 2]
        x = call(aten.permute.default, x, [2, *rest])
        x = self.emit.contiguous(self._swapped(x) if self.swaps and not back else x)
        x = self.emit.wait(c10d.all_to_all_single.default, x, come, go, self.axis.group)
        x = self._swapped(x) if self.swaps and back else x
        return call(aten.permute.default, x, [*range(1, 3), 0, *range(3, rank)])

    def _swapped(self, x: fx.Node) -> fx.Node:
        half = self.block // 2
        parts = [self.emit.call(aten.slice.Tensor, x, 0, start, start + half) for start in (half, 0)]
        return self.emit.call(aten.cat.default, parts, 0)

    def pair(self, first: fx.Node, second: fx.Node) -> fx.Node:
        return self.emit.call(aten.stack.default, [first, second])

    def of_pair(self, pair: fx.Node) -> list[fx.Node]:
        return [self.emit.call(aten.select.int, pair, 0, k) for k in (0, 1)]


def attention_ring(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> tuple[fx.Node, fx.Node]:
    """-> (out, lse) of this rank's rows, from its own queries, keys and values."""
    ring = _Ring(emit, node, axis, bool(args[_CAUSAL]), first=0)
    query, key, value = (ring.there(x) for x in args[:3])
    dtype = node.meta["val"][0].dtype
    keys = ring.pair(key, value)
    found: tuple[fx.Node, fx.Node] | None = None
    for step, piece in enumerate(ring.steps):
        coming = ring.start_rotation(keys) if step + 1 < axis.size else None
        if piece is not None:
            parts = [ring.cut(x, 2, piece.keys) for x in ([key, value] if step == 0 else ring.of_pair(keys))]
            flags = [*args[5:_CAUSAL], piece.causal, *args[_CAUSAL + 1 :]]
            both = emit.call(node.target, ring.cut(query, 2, piece.rows), *parts, None, None, *flags)
            part = emit.call(operator.getitem, both, 0), emit.call(operator.getitem, both, 1)
            found = part if found is None else joined(emit, piece.rows, ring.block, found, part, dtype)
        if coming is not None:
            keys = ring.wait(coming)
    assert found is not None
    return ring.back(found[0]), ring.back(found[1], rank=3)


def attention_ring_backward(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> tuple[Any, ...]:
    """(grad_out, query, key, value, mask, random key, out, lse, flags..., mask_needs_grad) -> gradients of this rank's
    query, keys and values."""
    ring = _Ring(emit, node, axis, bool(args[_CAUSAL + 3]), first=1)
    grad_out, query, key, value = (ring.there(x) for x in args[:4])
    out, lse = ring.there(args[6]), ring.there(args[7], rank=3)
    keys = ring.pair(key, value)
    grad_query: fx.Node | None = None
    sums: fx.Node | None = None  # of the block at hand
    for step, piece in enumerate(ring.steps):
        coming = ring.start_rotation(keys) if step + 1 < axis.size else None
        sums = ring.wait(ring.start_rotation(sums)) if sums is not None else None
        if piece is not None:
            own = [ring.cut(x, 2, piece.rows) for x in (grad_out, query, out, lse)]
            parts = [ring.cut(x, 2, piece.keys) for x in ring.of_pair(keys)]
            flags = [args[8], piece.causal, *args[10:15], False]
            grads = emit.call(node.target, own[0], own[1], *parts, None, None, own[2], own[3], *flags)
            mine, *others = (emit.call(operator.getitem, grads, k) for k in range(3))
            grad_query = _added(emit, grad_query, mine, piece.rows, ring.block)
            sums = _added(emit, sums, ring.pair(*others), piece.keys, ring.block)
        if coming is not None:
            keys = ring.wait(coming)
    assert sums is not None and grad_query is not None
    sums = ring.wait(ring.start_rotation(sums))
    return ring.back(grad_query), *(ring.back(x) for x in ring.of_pair(sums)), None


def _added(emit: Emitter, total: fx.Node | None, part: fx.Node, tokens: range, block: int) -> fx.Node:
    """part: of these tokens, the last dimension but one."""
    if tokens != range(block):
        part = emit.call(aten.constant_pad_nd.default, part, [0, 0, tokens.start, block - tokens.stop])
    return part if total is None else emit.call(aten.add.Tensor, total, part)
