"""Buffers: replicated on every rank whose stages read them, and joined where two directions of microbatches write them.

A buffer that the forward writes is x -> a x + b_k for microbatch k (profiler/buffer_updates.py). The first direction
takes x0 through its microbatches to x1, the second, at the same time, takes x0 through its n to y. One after the other
they would have made

    a^n x1 + (y - a^n x0)  =  a^n (x1 - x0) + y

of which each of the two ranks that hold the stage has one term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import ShardwrightError
from ..profiler.buffer_updates import update_scales
from ..profiler.graph import ModelGraph, SegmentInstance
from .mesh import RankGrid
from .parameters import sum_together
from .wiring import StageWiring, Wiring


class Buffers:
    """Buffers by name, the same on every rank that holds them.

    An update puts a new tensor in place of the old one, so that a backward that still needs the old one has it.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def read(self, names: Sequence[str]) -> list[torch.Tensor]:
        return [self.tensors[name] for name in names]

    def write(self, instance: SegmentInstance, slots: Sequence[int], values: Sequence[torch.Tensor]) -> None:
        for slot, value in zip(slots, values, strict=True):
            self.tensors[instance.buffers[slot]] = value


class BorrowingBuffers(Buffers):
    """A few of its own; the rest are another's, as they are when they are read."""

    def __init__(self, others: Buffers) -> None:
        super().__init__({})
        self.others = others

    def read(self, names: Sequence[str]) -> list[torch.Tensor]:
        return [self.tensors[name] if name in self.tensors else self.others.tensors[name] for name in names]


@dataclass(frozen=True)
class Written:
    """A buffer that the forward writes. ranks: pipeline rank that writes it, of each direction. scale: a above."""

    ranks: tuple[int, ...]
    scale: float


class SecondDirection(Buffers):
    """What the microbatches of the second direction see: each step, they start from what the first ones start from."""

    def __init__(self, first: Buffers, written: Mapping[str, Written], grid: RankGrid) -> None:
        super().__init__({})
        rank = grid.coord("pp")
        self.first, self.grid, self.rank = first, grid, rank
        self.written = {name: entry for name, entry in written.items() if rank in entry.ranks}
        self._before: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        self.tensors = dict(self.first.tensors)
        self._before = {name: self.tensors[name] for name in self.written}

    def join(self, num_microbatches: int) -> None:
        """num_microbatches: of the second direction. Every rank calls it."""
        shares: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
        for name in sorted(self.written, key=lambda name: (str(self._before[name].dtype), name)):
            entry, share = self.written[name], torch.zeros_like(self._before[name])
            if entry.ranks[0] == self.rank:
                moved = self.first.tensors[name] - self._before[name]
                share += moved if entry.scale == 1.0 else moved * entry.scale**num_microbatches
            if entry.ranks[1] == self.rank:
                share += self.tensors[name]
            shares.setdefault(tuple(sorted(set(entry.ranks))), {})[name] = share
        for ranks, tensors in sorted(shares.items()):
            summed = sum_together(tensors, self.grid.pipeline_subgroup(ranks)) if len(ranks) > 1 else tensors
            self.first.tensors.update(summed)
        self._before = {}


def buffer_names(graph: ModelGraph, stages: Sequence[StageWiring]) -> tuple[str, ...]:
    """Buffers that these stages read."""
    by_index = {inst.index: inst for inst in graph.instances}
    read = (by_index[i].buffers for stage in stages for i in stage.instances)
    return tuple(dict.fromkeys(name for names in read for name in names))


def written_buffers(graph: ModelGraph, wiring: Wiring) -> dict[str, Written]:
    """Raises ShardwrightError where one is read on another rank too, or cannot be written in two directions at once."""
    by_index = {inst.index: inst for inst in graph.instances}
    directions = len(wiring.stages) // wiring.num_stages
    readers: dict[str, list[set[int]]] = {}
    users: dict[str, set[tuple[int, int]]] = {}  # instance and slot
    for stage in wiring.stages:
        for index in stage.instances:
            for slot, name in enumerate(by_index[index].buffers):
                readers.setdefault(name, [set() for _ in range(directions)])[stage.direction].add(stage.rank)
                users.setdefault(name, set()).add((index, slot))
    written = {}
    for name in sorted(users):
        if not any(slot in graph.segments[by_index[i].segment].mutated_buffers for i, slot in users[name]):
            continue
        ranks = readers[name]
        if len(ranks[0]) > 1:
            raise _refused(
                f"buffer {name} is written in the forward and used by stages on pipeline ranks {sorted(ranks[0])}",
                "its new value would be missing on the other ranks",
                "stages that keep its users together, or --force pp=1",
            )
        scale = 1.0
        if directions > 1:
            scale = _total_scale(graph, [(by_index[i].segment, slot) for i, slot in users[name]])
            if math.isnan(scale) or not (graph.buffers[name][1].is_floating_point or scale == 1.0):
                raise _refused(
                    f"buffer {name} is written in the forward, by the microbatches of two directions",
                    "neither direction would see what the other wrote",
                    "--force schedule=1f1b",
                )
        written[name] = Written(tuple(next(iter(entry)) for entry in ranks), scale)
    return written


def _total_scale(graph: ModelGraph, users: Sequence[tuple[str, int]]) -> float:
    """Of all updates of a buffer by one microbatch; NaN where there is none. users: segments and slots."""
    scales = [update_scales(graph.segments[segment]).get(slot) for segment, slot in users]
    return math.prod(math.nan if scale is None else scale for scale in scales)


def _refused(what: str, means: str, works: str) -> ShardwrightError:
    return ShardwrightError(what, means=means, change="the stage cuts or the schedule", works=works)
