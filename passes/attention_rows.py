"""Attention of some rows of queries with all keys: the local programs of strategies that cut sequences.

The kernels count queries and keys both from zero, so rows that begin elsewhere are computed as pieces, in each of which
they do: the keys before a rank's own rows, which all of its rows see, and its own, of which a row sees those up to
itself. Pieces are joined by their log-sum-exp, as blocks are in flash and ring attention (arXiv:2310.01889, section
3); each piece's backward runs with the joined result and log-sum-exp, and gives its part of every gradient.

A window leaves of the keys before a corner of near rows and keys, whose mask is written out. So is that of all rows
where the caller has a mask too: a row that sees nothing in a piece would have no log-sum-exp to join by.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ops.placement import shard_size, shard_start
from .redistribute import Emitter, MeshAxis

aten = torch.ops.aten
# positions of arguments: query, key, value, mask, random key, then flags
_MASK, _CAUSAL, _WINDOW, _DROPOUT, _SHAPE, _OFFSET = 3, 6, 7, 8, 10, 11


@dataclass(frozen=True)
class Piece:
    """Rows of this rank's queries, and keys that some of them see. Where `masks`, which they see is written out."""

    rows: range
    keys: range
    causal: bool = False
    window: int = 0
    masks: bool = False


def pieces(start: int, count: int, num_keys: int, *, causal: bool, window: int, masked: bool) -> list[Piece]:
    """Of rows start to start + count. The first has all of them, and no two have the same keys."""
    rows, end = range(count), start + count
    first = max(0, start - window + 1) if window > 0 else 0
    last = end if causal else min(end + window - 1, num_keys) if window > 0 else num_keys
    if not causal and window <= 0:
        return [Piece(rows, range(num_keys))]
    if masked or not causal or end > num_keys:
        return [Piece(rows, range(first, max(first, min(last, num_keys))), masks=True)]
    own = Piece(rows, range(start, end), causal=True, window=window)
    if start == 0 or window == 1:
        return [own]
    if window > 0:
        return [own, Piece(range(min(count, window - 1)), range(first, start), masks=True)]
    return [own, Piece(rows, range(start))]


class _Rows:
    """One attention on this rank. args: of the forward, tensors replaced by local nodes."""

    def __init__(self, emit: Emitter, node: fx.Node, args: Sequence[Any], axis: MeshAxis, first: int) -> None:
        """first: position of the captured op's query."""
        query, key = (node.args[first + k].meta["val"].shape for k in (0, 1))  # type: ignore[union-attr]
        mask = node.args[first + _MASK]
        self.mask = mask.meta["val"] if isinstance(mask, fx.Node) else None
        start, count = shard_start(query[2], axis.size, axis.index), shard_size(query[2], axis.size, axis.index)
        self.emit, self.args, self.start, self.count, num_keys = emit, list(args), start, count, key[2]
        self.num_keys = num_keys
        self.causal, self.window = bool(args[_CAUSAL]), int(args[_WINDOW])
        self.pieces = pieces(
            start, count, num_keys, causal=self.causal, window=self.window, masked=args[_MASK] is not None
        )

    def cut(self, x: fx.Node, dim: int, part: range, size: int) -> fx.Node:
        if part == range(size):
            return x
        return self.emit.call(aten.slice.Tensor, x, dim, part.start, part.stop)

    def of_piece(self, piece: Piece) -> list[Any]:
        """The forward's arguments for a piece."""
        args = list(self.args)
        args[0] = self.cut(args[0], 2, piece.rows, self.count)
        args[1], args[2] = (self.cut(args[k], 2, piece.keys, self.num_keys) for k in (1, 2))
        if self.mask is not None and self.mask.dim() and self.mask.shape[-1] > 1:
            args[_MASK] = self.cut(args[_MASK], self.mask.dim() - 1, piece.keys, self.num_keys)
        if piece.masks:
            args[_MASK] = self._written_mask(piece, args[0], args[_MASK])
        args[_CAUSAL], args[_WINDOW] = piece.causal, piece.window
        if args[_DROPOUT] > 0 and args[_OFFSET] is not None:
            sample, head, row, key = args[_OFFSET]
            args[_OFFSET] = [sample, head, row + piece.rows.start, key + piece.keys.start]
        return args

    def _written_mask(self, piece: Piece, like: fx.Node, given: Any) -> fx.Node:
        """[rows, keys], True where a row sees a key. Of row i and key j here, j - i is less by the offset."""
        call, offset = self.emit.call, self.start + piece.rows.start - piece.keys.start
        seen = call(aten.new_ones.default, like, [len(piece.rows), len(piece.keys)], dtype=torch.bool)
        if self.causal or self.window > 0:
            seen = call(aten.tril.default, seen, offset + (0 if self.causal else self.window - 1))
        if self.window > 0:
            seen = call(aten.triu.default, seen, offset - self.window + 1)
        if self.mask is None:
            return seen
        if self.mask.dtype == torch.bool:
            return call(aten.logical_and.default, given, seen)
        return call(aten.masked_fill.Scalar, given, call(aten.logical_not.default, seen), float("-inf"))


def attention_rows(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> tuple[fx.Node, fx.Node]:
    """-> (out, lse) of this rank's rows."""
    rows = _Rows(emit, node, args, axis, first=0)
    found: list[tuple[Piece, fx.Node, fx.Node]] = []
    for piece in rows.pieces:
        both = emit.call(node.target, *rows.of_piece(piece))
        found.append((piece, emit.call(operator.getitem, both, 0), emit.call(operator.getitem, both, 1)))
    _, out, lse = found[0]
    for piece, other, other_lse in found[1:]:
        out, lse = joined(emit, piece.rows, rows.count, (out, lse), (other, other_lse), node.meta["val"][0].dtype)
    return out, lse


def joined(
    emit: Emitter,
    rows: range,
    count: int,
    whole: tuple[fx.Node, fx.Node],
    part: tuple[fx.Node, fx.Node],
    dtype: torch.dtype,
) -> tuple[fx.Node, fx.Node]:
    """(out, lse) of `count` rows, of which `rows` saw the keys of `part` too, weighed by the sums of their scores."""
    call = emit.call

    def of(x: fx.Node, some: range) -> fx.Node:
        return x if some == range(count) else call(aten.slice.Tensor, x, 2, some.start, some.stop)

    out, lse = (of(x, rows) for x in whole)
    total = call(aten.logaddexp.default, lse, part[1])

    def weighed(x: fx.Node, own: fx.Node) -> fx.Node:
        weight = call(aten.exp.default, call(aten.sub.Tensor, own, total))
        return call(aten.mul.Tensor, x, call(aten.unsqueeze.default, weight, -1))

    both = call(aten.add.Tensor, weighed(out, lse), weighed(part[0], part[1]))
    both = call(aten._to_copy.default, both, dtype=dtype)
    others = range(rows.start), range(rows.stop, count)
    if not any(map(len, others)):
        return both, total
    rest = [[of(x, some) if len(some) else None for some in others] for x in whole]
    made = (
        [x for x in (before, new, after) if x is not None]
        for new, (before, after) in zip((both, total), rest, strict=True)
    )
    out, lse = (call(aten.cat.default, parts, 2) for parts in made)
    return out, lse


def attention_rows_backward(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> tuple[Any, ...]:
    """(grad_out, query, key, value, mask, random key, out, lse, flags..., mask_needs_grad) -> gradients of this rank's
    rows of the query, and of all keys and values what these rows give."""
    forward = [*args[1:6], *args[8:15]]
    rows = _Rows(emit, node, forward, axis, first=1)
    grad_out, out, lse = args[0], args[6], args[7]
    grad_query: fx.Node | None = None
    of_keys: list[tuple[range, fx.Node, fx.Node]] = []
    for piece in rows.pieces:
        own = rows.of_piece(piece)
        parts = [rows.cut(x, 2, piece.rows, rows.count) for x in (grad_out, out, lse)]
        found = emit.call(node.target, parts[0], *own[:5], parts[1], parts[2], *own[5:], False)
        grads = [emit.call(operator.getitem, found, k) for k in range(3)]
        of_keys.append((piece.keys, grads[1], grads[2]))
        behind = rows.count - piece.rows.stop
        mine = emit.call(aten.constant_pad_nd.default, grads[0], [0, 0, 0, behind]) if behind else grads[0]
        grad_query = mine if grad_query is None else emit.call(aten.add.Tensor, grad_query, mine)
    of_keys.sort(key=lambda item: item[0].start)
    before, behind = of_keys[0][0].start, rows.num_keys - of_keys[-1][0].stop
    whole = []
    for parts in ([grads[0] for _, *grads in of_keys], [grads[1] for _, *grads in of_keys]):
        grad = parts[0] if len(parts) == 1 else emit.call(aten.cat.default, parts, 2)
        padding = [0, 0, before, behind]
        whole.append(emit.call(aten.constant_pad_nd.default, grad, padding) if before or behind else grad)
    return grad_query, *whole, None
