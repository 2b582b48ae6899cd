"""Collectives under way: started early, waited for late, few at a time, because each holds its buffers."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ._torch import all_gather_flat, reduce_scatter_flat

Result = TypeVar("Result")
# A sequence of collectives of which each needs the one before: yields a collective under way with the tensors that it
# reads and writes, and is resumed when it is done.
SequenceOf = Generator[tuple[Any, tuple[torch.Tensor, ...]], None, Result]
Sequence = SequenceOf[None]


class Pending:
    """Sequences under way on one rank, at most `limit` collectives at once: the oldest is waited for first.

    When one is waited for depends on how many were started, never on which is done, so that all ranks agree.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: list[tuple[Sequence, Any, tuple[torch.Tensor, ...]]] = []

    def start(self, sequence: Sequence) -> None:
        self.drain(self.limit - 1)  # first, so that its buffers are gone when those of this one are made
        self._advance(sequence)

    def drain(self, leave: int = 0) -> None:
        while len(self._entries) > leave:
            sequence, work, _ = self._entries.pop(0)
            work.wait()
            self._advance(sequence)

    def _advance(self, sequence: Sequence) -> None:
        found = next(sequence, None)
        if found is not None:
            self._entries.append((sequence, *found))

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, _, tensors in self._entries for t in tensors)


class Summing:
    """A tensor that the ranks of a group are adding up; without torch.distributed the sum is there at once."""

    def __init__(self, tensor: torch.Tensor, group: Any = None, *, alone: bool) -> None:
        self._tensor = tensor
        self._work = None if alone else dist.all_reduce(tensor, group=group, async_op=True)

    def wait(self) -> torch.Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._tensor


def start_all_gather(out: torch.Tensor, block: torch.Tensor, group: Any) -> Any:
    return all_gather_flat(out, block, group=group, async_op=True)


def start_reduce_scatter(out: torch.Tensor, packed: torch.Tensor, group: Any) -> Any:
    """packed: one block for each rank. gloo has no reduce-scatter: it would sum everything on every rank; there each
    rank is sent its blocks and adds them up, which is half of the traffic."""
    if dist.get_backend(group) != "gloo":
        return reduce_scatter_flat(out, packed, group=group, async_op=True)
    received = torch.empty_like(packed)
    return _SumOfBlocks(dist.all_to_all_single(received, packed, group=group, async_op=True), received, out)


class _SumOfBlocks:
    def __init__(self, work: Any, received: torch.Tensor, out: torch.Tensor) -> None:
        self._work, self._received, self._out = work, received, out

    def wait(self) -> None:
        self._work.wait()
        torch.sum(self._received.view(-1, self._out.numel()), 0, out=self._out)
