"""How tokens travel between ranks: what goes where, and messages under way while experts compute.

Tokens go in chunks, one after the other: while experts compute one chunk, the next is on its way to them and the one
before on its way back (Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", arXiv:2206.03382, section 3.2).
What a chunk does is a generator that yields while a message of its own is under way; in_turns() runs those of all
chunks, in an order that follows from their number alone, so that all ranks send alike.

How many tokens of each chunk go where is exchanged once, before any of them leaves: afterwards nothing waits for a
device to say how much there is, so that messages and products are started ahead of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from . import _torch

Result = TypeVar("Result")
UnderWay = Generator[None, None, Result]


class Place(NamedTuple):
    """Where experts lie, and how tokens go there.

    firsts, counts: of each rank of the group, its first expert and how many it has. A choice of an expert that no rank
    of the group has adds nothing, so that a tensor axis may cut experts beside. per_host: how many ranks, next to each
    other, share a host. Where that is more than one, a token crosses once to each host that has an expert which it
    chose, to the rank in its own rank's place there, which sends it on; results are summed on each host before they go
    back. chunks: of each rank's tokens. across, inside: groups of the ranks in the same place on each host, and of
    those of a host. parts: into how many another axis cuts the experts of each rank.
    """

    firsts: Sequence[int]
    counts: Sequence[int]
    rank: int
    per_host: int = 1
    chunks: int = 1
    group: str = ""
    across: str = ""
    inside: str = ""
    parts: int = 1

    @property
    def hosts(self) -> int:
        return len(self.counts) // self.per_host

    def chosen(self, index: torch.Tensor) -> torch.Tensor:
        """[N, K] -> [ranks, N]: how many experts of each rank each token chose."""
        placed = zip(self.firsts, self.counts, strict=True)
        return torch.stack([((index >= first) & (index < first + count)).sum(1) for first, count in placed])

    def to_hosts(self, chosen: torch.Tensor) -> torch.Tensor:
        """[ranks, N] -> [hosts, N]: whether any rank of a host has an expert which a token chose."""
        return (chosen > 0).unflatten(0, (-1, self.per_host)).any(1)

    def in_host(self, chosen: torch.Tensor) -> torch.Tensor:
        """[ranks, N] -> [ranks of this host, N]: whether a rank has one."""
        first = self.rank - self.rank % self.per_host
        return chosen[first : first + self.per_host] > 0

    def bounds(self, num_tokens: int) -> list[int]:
        """Where chunks begin, and where the last one ends."""
        return [k * num_tokens // self.chunks for k in range(self.chunks + 1)]


class Leg(NamedTuple):
    """A hop of a chunk. sent, received: how many tokens to and from each rank of `group`."""

    sent: list[int]
    received: list[int]
    group: Any

    def order(self, goes: torch.Tensor) -> torch.Tensor:
        """Tokens in the order in which they are sent, by the rank that they go to. goes: [ranks, N]."""
        return torch.nonzero_static(goes, size=sum(self.sent))[:, 1]


class Chunk(NamedTuple):
    """span: which of the rank's tokens. legs: on their way to experts. choices: of this rank's experts, among all that
    come here."""

    span: slice
    legs: list[Leg]
    choices: int


def chunks_of(place: Place, index: torch.Tensor) -> list[Chunk]:
    """What of a rank's tokens goes where, in each chunk. Waits for the device, once."""
    bounds = place.bounds(len(index))
    parts = [place.chosen(index[a:b]) for a, b in itertools.pairwise(bounds)]
    found = _by_hosts(place, parts) if place.per_host > 1 else _directly(place, parts)
    spans = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    return [Chunk(span, legs, choices) for span, (legs, choices) in zip(spans, found, strict=True)]


def _directly(place: Place, parts: Sequence[torch.Tensor]) -> list[tuple[list[Leg], int]]:
    group = _torch.group_by_name(place.group)
    own = torch.stack([n for chosen in parts for n in ((chosen > 0).sum(1), chosen.sum(1))], 1)  # [ranks, chunks * 2]
    other = torch.empty_like(own)
    dist.all_to_all_single(other, own, group=group)
    sent, received, choices = torch.stack([own[:, ::2], other[:, ::2], other[:, 1::2]]).transpose(1, 2).tolist()
    return [([Leg(sent[k], received[k], group)], sum(choices[k])) for k in range(place.chunks)]


def _by_hosts(place: Place, parts: Sequence[torch.Tensor]) -> list[tuple[list[Leg], int]]:
    """Each rank learns what every other one sends where: of the second hop it sends on what came in the first."""
    across, inside = _torch.group_by_name(place.across), _torch.group_by_name(place.inside)
    ranks, hosts, per_host = len(place.counts), place.hosts, place.per_host
    host, spot = divmod(place.rank, per_host)
    own = torch.stack(
        [torch.cat([(chosen > 0).sum(1), chosen.sum(1), place.to_hosts(chosen).sum(1)]) for chosen in parts]
    )  # [chunks, tokens for each rank, choices of each rank's experts, tokens for each host]
    every = own.new_empty(ranks * place.chunks, own.shape[1])
    dist.all_gather_into_tensor(every, own, group=_torch.group_by_name(place.group))
    tokens, choices, over = every.unflatten(0, (ranks, -1)).split([ranks, ranks, hosts], 2)
    tokens = tokens.unflatten(2, (hosts, per_host)).unflatten(0, (hosts, per_host))  # [h, spot, chunk, to h, to spot]
    over = over.unflatten(0, (hosts, per_host))
    columns = [
        over[host, spot],  # to each host
        over[:, spot, :, host].t(),  # from each
        tokens[:, spot, :, host].sum(0),  # on to each rank of this host, of what came from all hosts
        tokens[:, :, :, host, spot].sum(0).t(),  # from each rank of this host
        choices[:, :, place.rank].sum(0).unsqueeze(1),
    ]
    found = []
    for row in torch.cat(columns, 1).tolist():
        parts_of = iter(row)
        first, second = (
            Leg([next(parts_of) for _ in range(n)], [next(parts_of) for _ in range(n)], group)
            for n, group in ((hosts, across), (per_host, inside))
        )
        found.append(([first, second], next(parts_of)))
    return found


# --------------------------------------------------------------------------- messages


def exchange(leg: Leg, columns: Sequence[torch.Tensor], *, back: bool = False) -> UnderWay[list[torch.Tensor]]:
    """Rows of several tensors, in one message to each rank. back: of what came, to where it came from."""
    rows = [_as_type(t, torch.uint8) for t in columns]
    packed = torch.cat(rows, 1) if len(rows) > 1 else rows[0]
    go, come = (leg.received, leg.sent) if back else (leg.sent, leg.received)
    out = packed.new_empty(sum(come), packed.shape[1])
    work = dist.all_to_all_single(out, packed, come, go, group=leg.group, async_op=True)
    yield
    work.wait()
    parts = torch.split(out, [row.shape[1] for row in rows], 1)
    return [_as_type(part, t.dtype) for part, t in zip(parts, columns, strict=True)]


def send(
    place: Place, chunk: Chunk, columns: Sequence[torch.Tensor], index: torch.Tensor, weight: torch.Tensor
) -> UnderWay[tuple[list[tuple[torch.Tensor, int]], list[torch.Tensor], torch.Tensor, torch.Tensor]]:
    """(tokens of each leg in the order in which they went, with how many there were; rows of the columns; choices
    counted from this rank's first expert; their weights) of the tokens that come: at once, or to each host and from
    there to its ranks."""
    orders: list[tuple[torch.Tensor, int]] = []
    rows = [t[chunk.span] for t in (*columns, index.to(torch.int32), weight)]
    for k, leg in enumerate(chunk.legs):
        chosen = place.chosen(rows[-2])
        goes = chosen > 0 if len(chunk.legs) == 1 else place.in_host(chosen) if k else place.to_hosts(chosen)
        orders.append((leg.order(goes), goes.shape[1]))
        rows = yield from exchange(leg, [t[orders[-1][0]] for t in rows])
    *rows, chosen, scale = rows
    return orders, rows, chosen.long() - place.firsts[place.rank], scale


def bring_back(
    chunk: Chunk, orders: Sequence[tuple[torch.Tensor, int]], parts: list[torch.Tensor]
) -> UnderWay[list[torch.Tensor]]:
    """Results of the tokens that came, summed where they came from. orders: as send() has them."""
    for leg, (order, num_tokens) in zip(reversed(chunk.legs), reversed(orders), strict=True):
        came = yield from exchange(leg, parts, back=True)
        parts = [_summed(leg, order, num_tokens, part) for part in came]
    return parts


def _as_type(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same bytes. A part of one row, or of none, counts as contiguous with the offset and the stride of the rows
    that it is cut from, which need be no multiple of what an entry of another type takes."""
    if not rows.is_contiguous() or min(rows.shape) < 2:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(dtype)


def _summed(leg: Leg, order: torch.Tensor, num_tokens: int, part: torch.Tensor) -> torch.Tensor:
    """What came back for each token, added up in the order of ranks, in float32 at least."""
    wide = torch.promote_types(part.dtype, torch.float32)
    total = torch.zeros(num_tokens, part.shape[1], dtype=wide, device=part.device)
    of_ranks = torch.split(order, leg.sent), torch.split(part, leg.sent)
    for tokens, rows in zip(*of_ranks, strict=True):
        total.index_add_(0, tokens, rows.to(wide))
    return total.to(part.dtype)


def in_turns(sequences: Sequence[UnderWay[Result]]) -> list[Result]:
    """What each returns, in their order. Each runs to where it waits for a message, as costmodel.experts.turns() says;
    all have as many turns."""
    found: dict[int, Result] = {}
    step = 0
    while len(found) < len(sequences):
        for k in reversed(range(min(step + 1, len(sequences)))):
            if k not in found:
                try:
                    next(sequences[k])
                except StopIteration as end:
                    found[k] = end.value
        step += 1
    return [found[k] for k in range(len(sequences))]
