"""Experts split over ranks, tokens sent to them: shardwright::expert_dispatch and its backward, and their lowerings.

Each rank has some of the experts and some of the tokens. A token goes once to every rank that holds an expert which it
chose, with its choices and their weights; the rank computes what its own experts add (profiler/expert_ops.py: choices
of others' add nothing), and sends that back, where it is summed. Nothing is dropped and nothing padded: how many tokens
go where follows from the choices, so the counts are exchanged first, and all of it is one op of a static graph. The
backward sends tokens again, with the gradients of their results.

What the experts had before their activation stays on their rank for the backward: as many rows as choices came there.
Its size in the graph is that of the rank's own choices, [N, K, 2 I], which is what comes to a rank on average.

firsts, counts: of each rank of the group, its first expert and how many it has. A choice of an expert that no rank of
the group has adds nothing, so that a tensor axis may cut experts beside. per_host: how many ranks, next to each other,
share a host. Where that is more than one, a token crosses once to each host that has an expert which it chose, to the
rank in its own rank's place there, which sends it on; results are summed on each host before they go back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import fx

from ..ops.placement import shard_size, shard_start
from ..profiler.expert_ops import (
    BIASES,
    INPUTS,
    backward_fake,
    forward_fake,
    results,
    run_experts,
    run_experts_backward,
)
from . import _torch
from .redistribute import Emitter, MeshAxis

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
_PLACE = "int[] firsts, int[] counts, int rank, int per_host, str group"


class _Place(NamedTuple):
    """Where experts lie, as _PLACE says."""

    firsts: Sequence[int]
    counts: Sequence[int]
    rank: int
    per_host: int
    group: str

    def chosen(self, index: torch.Tensor) -> torch.Tensor:
        """[N, K] -> [ranks, N]: how many experts of each rank each token chose."""
        placed = zip(self.firsts, self.counts, strict=True)
        return torch.stack([((index >= first) & (index < first + count)).sum(1) for first, count in placed])

    def to_hosts(self, chosen: torch.Tensor) -> torch.Tensor:
        """The same of all ranks of each host, as if one of them had their experts: the one in this rank's place."""
        found = torch.zeros_like(chosen)
        found[self.rank % self.per_host :: self.per_host] = chosen.unflatten(0, (-1, self.per_host)).sum(1)
        return found

    def in_host(self, chosen: torch.Tensor) -> torch.Tensor:
        """The same without ranks of other hosts."""
        first = self.rank - self.rank % self.per_host
        found = torch.zeros_like(chosen)
        found[first : first + self.per_host] = chosen[first : first + self.per_host]
        return found


class _Routes(NamedTuple):
    """tokens: own tokens in the order in which they are sent, by the rank that they go to. sent, received: how many to
    and from each rank. choices: of this rank's experts, among what is received. num_tokens: own ones, sent or not."""

    tokens: torch.Tensor
    sent: list[int]
    received: list[int]
    choices: int
    group: Any
    num_tokens: int = 0


def _routes(chosen: torch.Tensor, group: str) -> _Routes:
    """chosen: [ranks, N], of each rank's experts."""
    goes, ranks = chosen > 0, _torch.group_by_name(group)
    own = torch.stack([goes.sum(1), chosen.sum(1)], 1)
    other = torch.empty_like(own)
    dist.all_to_all_single(other, own, group=ranks)
    sent, received, choices = torch.stack([own[:, 0], other[:, 0], other[:, 1]]).tolist()
    return _Routes(goes.nonzero()[:, 1], sent, received, sum(choices), ranks, chosen.shape[1])


def _exchange(routes: _Routes, columns: Sequence[torch.Tensor], *, back: bool = False) -> list[torch.Tensor]:
    """Rows of several tensors, in one message to each rank. back: of what came, to where it came from."""
    rows = [_as_type(t, torch.uint8) for t in columns]
    packed = torch.cat(rows, 1) if len(rows) > 1 else rows[0]
    go, come = (routes.received, routes.sent) if back else (routes.sent, routes.received)
    out = packed.new_empty(sum(come), packed.shape[1])
    dist.all_to_all_single(out, packed, come, go, group=routes.group)
    parts = torch.split(out, [row.shape[1] for row in rows], 1)
    return [_as_type(part, t.dtype) for part, t in zip(parts, columns, strict=True)]


def _sent(
    place: _Place, columns: Sequence[torch.Tensor], index: torch.Tensor, weight: torch.Tensor
) -> tuple[list[_Routes], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(the way, rows of the columns, choices counted from this rank's first expert, their weights) of the tokens that
    come: at once, or to each host and from there to its ranks."""
    way, rows = [], [*columns, index.to(torch.int32), weight]
    for legs in (place.to_hosts, place.in_host) if place.per_host > 1 else (lambda chosen: chosen,):
        routes = _routes(legs(place.chosen(rows[-2])), place.group)
        rows = _exchange(routes, [t[routes.tokens] for t in rows])
        way.append(routes)
    # Only the last way's `choices` is used: on the way to the hosts it counts what all ranks of this host compute.
    *rows, chosen, scale = rows
    return way, rows, chosen.long() - place.firsts[place.rank], scale


def _back(way: Sequence[_Routes], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results of the tokens that came, summed where they came from."""
    for routes in reversed(way):
        parts = [_summed(routes, part) for part in _exchange(routes, parts, back=True)]
    return parts


def _as_type(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same bytes. A part of one row, or of none, counts as contiguous with the offset and the stride of the rows
    that it is cut from, which need be no multiple of what an entry of another type takes."""
    if not rows.is_contiguous() or min(rows.shape) < 2:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(dtype)


def _summed(routes: _Routes, part: torch.Tensor) -> torch.Tensor:
    """What came back for each token, added up in the order of ranks, in float32 at least."""
    wide = torch.promote_types(part.dtype, torch.float32)
    total = torch.zeros(routes.num_tokens, part.shape[1], dtype=wide, device=part.device)
    of_ranks = torch.split(routes.tokens, routes.sent), torch.split(part, routes.sent)
    for tokens, rows in zip(*of_ranks, strict=True):
        total.index_add_(0, tokens, rows.to(wide))
    return total.to(part.dtype)


def _forward(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, index, weight, *experts, activation, firsts, counts, rank, per_host, group = operands
    way, (rows,), here, scale = _sent(_Place(firsts, counts, rank, per_host, group), [hidden], index, weight)
    out, pre = run_experts(rows, here, scale, experts, activation, way[-1].choices)
    return _back(way, [out])[0], pre


def _backward(*operands: Any) -> tuple[torch.Tensor, ...]:
    grad_out, hidden, index, weight, *experts, activation, firsts, counts, rank, per_host, group, pre = operands
    place = _Place(firsts, counts, rank, per_host, group)
    way, (grad_rows, rows), here, scale = _sent(place, [grad_out, hidden], index, weight)
    grad_hidden, grad_weight, *of_experts = run_experts_backward(
        grad_rows, rows, here, scale, experts, pre, activation, way[-1].choices
    )
    return *_back(way, [grad_hidden, grad_weight]), *of_experts


for _overload, _operands in (("default", INPUTS), ("bias", f"{INPUTS}, {BIASES}")):
    _name, _of_gradients = (
        f"{n}.{_overload}".removesuffix(".default") for n in ("expert_dispatch", "expert_dispatch_backward")
    )
    _given = f"{_operands}, str activation, {_PLACE}"
    _LIBRARY.define(f"{_name}({_given}) -> (Tensor out, Tensor pre)")
    _LIBRARY.define(f"{_of_gradients}(Tensor grad_out, {_given}, Tensor? pre) -> {results(_overload)}")
    _LIBRARY.impl(_name, _forward, "CompositeExplicitAutograd")
    _LIBRARY.impl(_of_gradients, _backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shardwright::{_name}", forward_fake, lib=_LIBRARY)
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


def dispatch_experts(
    emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis, inner: MeshAxis | None = None
) -> fx.Node:
    """(hidden, index, weight, experts..., activation) -> out, pre"""
    place = experts_of(node.args[3].meta["val"].shape[0], axis, inner)  # type: ignore[union-attr]
    return emit.call(_overload_of(expert_dispatch, node), *args, *place, axis.index, axis.per_host, axis.group)


def dispatch_experts_backward(
    emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis, inner: MeshAxis | None = None
) -> fx.Node:
    """(grad_out, hidden, index, weight, experts..., pre, activation); without pre where the experts are cut twice: the
    plan counts on its being computed again there."""
    *operands, pre, activation = args
    place = experts_of(node.args[4].meta["val"].shape[0], axis, inner)  # type: ignore[union-attr]
    op = _overload_of(expert_dispatch_backward, node)
    return emit.call(
        op, *operands, activation, *place, axis.index, axis.per_host, axis.group, pre if inner is None else None
    )


def _overload_of(packet: Any, node: fx.Node) -> Any:
    with_biases = (torch.ops.shardwright.expert_mlp.bias, torch.ops.shardwright.expert_mlp_backward.bias)
    return packet.bias if node.target in with_biases else packet.default
