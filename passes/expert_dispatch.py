"""Experts split over ranks, tokens sent to them: shardwright::expert_dispatch and its backward, and their lowerings.

Each rank has some of the experts and some of the tokens. A token goes once to every rank that holds an expert which it
chose, with its choices and their weights; the rank computes what its own experts add (profiler/expert_ops.py: choices
of others' add nothing), and sends that back, where it is summed. Nothing is dropped and nothing padded: how many tokens
go where follows from the choices, so the counts are exchanged first, and all of it is one op of a static graph.

For the backward the tokens that came stay on the rank of the experts, and what these had before their activation: as
many rows as tokens and choices came there. Their sizes in the graph are those of the rank's own tokens, which is what
comes to a rank on average. Where the plan makes "NODE.2>kept" again, tokens do not stay: the backward sends them again,
with the gradients of their results.

What follows it in the arguments is where experts lie and how tokens go there (expert_routes.py).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from ..costmodel.experts import copies_of_token
from ..ops.placement import shard_size, shard_start
from ..plans.placements import kept_key
from ..profiler.expert_ops import (
    BIASES,
    INPUTS,
    ROWS,
    ExpertsBackward,
    backward_fake,
    forward_fake,
    results,
    run_experts,
)
from .expert_routes import Chunk, Place, UnderWay, bring_back, chunks_of, in_turns, send
from .redistribute import Emitter, MeshAxis

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
_PLACE = "int[] firsts, int[] counts, int rank, int per_host, int chunks, str group, str across, str inside, int parts"
_NUM_PLACE = len(Place._fields)
Columns = TypeVar("Columns", bound=Sequence[torch.Tensor])


def _forward(*operands: Any) -> tuple[torch.Tensor, ...]:
    *tensors, activation = operands[:-_NUM_PLACE]
    hidden, index, weight, *experts = tensors
    place = Place(*operands[-_NUM_PLACE:])

    def of_chunk(chunk: Chunk) -> UnderWay[tuple[torch.Tensor, ...]]:
        orders, (rows,), here, scale = yield from send(place, chunk, [hidden], index, weight)
        out, pre = run_experts(rows, here, scale, experts, activation, chunk.choices)
        (out,) = yield from bring_back(chunk, orders, [out])
        return out, pre, rows

    return tuple(_joined(in_turns([of_chunk(chunk) for chunk in chunks_of(place, index)])))


def _backward(*operands: Any) -> tuple[torch.Tensor, ...]:
    *given, pre, came = operands
    *tensors, activation = given[:-_NUM_PLACE]
    grad_out, hidden, index, weight, *experts = tensors
    place = Place(*given[-_NUM_PLACE:])
    chunks = chunks_of(place, index)
    kept: list[tuple[torch.Tensor, ...]] = [()] * len(chunks)
    pres = [None] * len(chunks) if pre is None else pre.split([chunk.choices for chunk in chunks])
    if came is not None:
        kept = [(rows,) for rows in came.split([sum(chunk.legs[-1].received) for chunk in chunks])]
    totals = Totals(len(chunks))

    def of_chunk(
        chunk: Chunk, pre: torch.Tensor | None, kept: tuple[torch.Tensor, ...]
    ) -> UnderWay[list[torch.Tensor]]:
        columns = [grad_out] if kept else [grad_out, hidden]
        orders, sent, here, scale = yield from send(place, chunk, columns, index, weight)
        grad, rows = *sent, *kept
        del sent
        work = ExpertsBackward(grad, rows, here, scale, experts, pre, activation, chunk.choices)
        del grad, rows
        back = bring_back(chunk, orders, work.of_inputs())
        next(back)
        yield  # for the message of the next chunk
        totals.add(work.of_experts())  # beside this one's
        del work
        return (yield from back)

    of_inputs = in_turns([of_chunk(*each) for each in zip(chunks, pres, kept, strict=True)])
    of_experts = totals.taken()  # before tokens' are joined: totals are wider than what is left of them
    return *_joined(of_inputs), *of_experts


class Totals:
    """Gradients of experts, summed over chunks as each chunk ends: in float32 where they are narrower, so that their
    sum is rounded once."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._sums: list[torch.Tensor] = []
        self._dtypes: list[torch.dtype] = []

    def add(self, parts: Iterator[torch.Tensor]) -> None:
        """parts: of one chunk, computed one after the other."""
        for k in itertools.count():
            part = next(parts, None)
            if part is None:
                break
            if k < len(self._sums):
                self._sums[k].add_(part)
            else:
                wide = torch.promote_types(part.dtype, torch.float32)
                self._dtypes.append(part.dtype)
                self._sums.append(part.to(wide) if self._chunks > 1 else part)
            del part  # before the next one is computed

    def taken(self) -> list[torch.Tensor]:
        """In the types in which they came. Nothing is left here."""
        return [self._sums.pop(0).to(dtype) for dtype in self._dtypes]


def _joined(of_chunks: list[Columns]) -> Iterator[torch.Tensor]:
    """Rows of all chunks, tensor by tensor: parts are let go of once they are joined. of_chunks is emptied."""
    columns = [list(column) for column in zip(*of_chunks, strict=True)]
    of_chunks.clear()
    for column in columns:
        yield torch.cat(column) if len(column) > 1 else column[0]
        column.clear()


def _forward_fake(*operands: Any) -> tuple[torch.Tensor, ...]:
    hidden, index, place = operands[0], operands[1], Place(*operands[-_NUM_PLACE:])
    rows = hidden.shape[0] * copies_of_token(index.shape[1], len(place.counts), place.parts)
    return *forward_fake(*operands), hidden.new_empty(round(rows), hidden.shape[1])


for _overload, _operands in (("default", INPUTS), ("bias", f"{INPUTS}, {BIASES}")):
    _name, _of_gradients = (
        f"{n}.{_overload}".removesuffix(".default") for n in ("expert_dispatch", "expert_dispatch_backward")
    )
    _given = f"{_operands}, str activation, {_PLACE}"
    _LIBRARY.define(f"{_name}({_given}) -> (Tensor out, Tensor pre, Tensor rows)")
    _LIBRARY.define(f"{_of_gradients}(Tensor grad_out, {_given}, Tensor? pre, Tensor? rows) -> {results(_overload)}")
    _LIBRARY.impl(_name, _forward, "CompositeExplicitAutograd")
    _LIBRARY.impl(_of_gradients, _backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shardwright::{_name}", _forward_fake, lib=_LIBRARY)
    torch.library.register_fake(f"shardwright::{_of_gradients}", backward_fake, lib=_LIBRARY)

expert_dispatch = torch.ops.shardwright.expert_dispatch
expert_dispatch_backward = torch.ops.shardwright.expert_dispatch_backward


# --------------------------------------------------------------------------- lowerings


def experts_of(num_experts: int, axis: MeshAxis, inner: MeshAxis | None) -> tuple[list[int], list[int]]:
    """First expert and number of experts of each rank of the axis, at this rank's place on an axis that cuts what the
    first one leaves."""
    firsts, counts = [], []
    for rank in range(axis.size):
        start, count = shard_start(num_experts, axis.size, rank), shard_size(num_experts, axis.size, rank)
        if inner is not None:
            start += shard_start(count, inner.size, inner.index)
            count = shard_size(count, inner.size, inner.index)
        firsts.append(start)
        counts.append(count)
    return firsts, counts


def _where(axis: MeshAxis, num_experts: int, inner: MeshAxis | None) -> tuple[Any, ...]:
    """As the ops take it."""
    ways = axis.experts
    return Place(
        *experts_of(num_experts, axis, inner),
        axis.index,
        ways.per_host,
        ways.chunks,
        axis.group,
        *ways.hop_groups,
        inner.size if inner is not None else 1,
    )


def dispatch_experts(
    emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis, inner: MeshAxis | None = None
) -> fx.Node:
    """(hidden, index, weight, experts..., activation) -> out, pre, and rows for the backward"""
    place = _where(axis, node.args[3].meta["val"].shape[0], inner)  # type: ignore[union-attr]
    result = emit.call(_overload_of(expert_dispatch, node), *args, *place)
    emit.call(operator.getitem, result, ROWS).meta["form"] = kept_key(node.name, ROWS)
    return result


def dispatch_experts_backward(
    emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis, inner: MeshAxis | None = None
) -> fx.Node:
    """(grad_out, hidden, index, weight, experts..., pre, activation); without pre where the experts are cut twice: the
    plan counts on its being computed again there."""
    *operands, pre, activation = args
    place = _where(axis, node.args[4].meta["val"].shape[0], inner)  # type: ignore[union-attr]
    op = _overload_of(expert_dispatch_backward, node)
    return emit.call(op, *operands, activation, *place, pre if inner is None else None, _rows_beside(pre))


def _rows_beside(pre: fx.Node) -> fx.Node | None:
    """Of the results of a forward, those that its lowering named beside this one."""
    results = pre.args[0].users if pre.target is operator.getitem else ()  # type: ignore[union-attr]
    return next((node for node in results if node.args[1] == ROWS), None)


def send_again(graph: fx.Graph, recomputed: Collection[str]) -> None:
    """In place: backwards of experts whose tokens are among what is made again have none, and send them. Where the
    experts' forward itself is made again, they come with it."""
    of_gradients = (expert_dispatch_backward.default, expert_dispatch_backward.bias)
    for node in list(graph.nodes):
        rows = node.args[-1] if node.target in of_gradients else None
        if isinstance(rows, fx.Node) and rows.meta["form"] in recomputed and rows.meta["of"] not in recomputed:
            node.args = (*node.args[:-1], None)
    graph.eliminate_dead_code()


def _overload_of(packet: Any, node: fx.Node) -> Any:
    with_biases = (torch.ops.shardwright.expert_mlp.bias, torch.ops.shardwright.expert_mlp_backward.bias)
    return packet.bias if node.target in with_biases else packet.default
