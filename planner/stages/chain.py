"""Chain: the segment instances of a model in execution order, as arrays that stage cuts and bounds are computed from.

Prologue instances (input-only work) stand outside: every stage that reads their values runs them itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...costmodel.memory import StageState, held_elements
from ...costmodel.segment import RecomputePoint, Workspace
from ...profiler.graph import ModelGraph
from ..interfaces import ShardingSolution


@dataclass(frozen=True)
class Repeat:
    """A parameter that instance `later` reads and instance `earlier` has read before it (tied, or a module called
    twice).
    """

    earlier: int
    later: int
    elements: float
    trainable: float


@dataclass(frozen=True)
class Shared:
    """A value that positions `earlier` and `later` both keep for their backwards, and none between them."""

    earlier: int
    later: int
    num_bytes: float


@dataclass(frozen=True)
class Shape:
    """What depends on the model alone. Positions count the instances outside the prologue."""

    instances: tuple[int, ...]  # position -> index in ModelGraph.instances
    segments: tuple[str, ...]  # position -> distinct segment
    prologue: tuple[int, ...]  # indices of prologue instances, in order
    needs: tuple[frozenset[int], ...]  # position -> prologue instances that it needs, through others too
    spans: tuple[tuple[str, int, int, bool], ...]  # value, position of its producer, of its last reader, has a gradient
    repeats: tuple[tuple[int, int, str], ...]  # earlier position, later position, parameter
    reads: tuple[tuple[str, ...], ...] = ()  # position -> value of each of its inputs; "" where it lasts anyway


def model_shape(graph: ModelGraph) -> Shape:
    """Who feeds whom, once for each model."""
    producer: dict[str, int] = {}
    for instance in graph.instances:
        for value in instance.outputs:
            producer.setdefault(value, instance.index)
    # a number of the whole batch is computed, part by part, where it is read
    producer |= {f"input:{entry}": producer[part] for entry, (part, _) in graph.totals.items()}
    by_index = {instance.index: instance for instance in graph.instances}
    prologue = [i.index for i in graph.instances if graph.segments[i.segment].is_prologue]
    inside = set(prologue)
    needed: dict[int, frozenset[int]] = {}
    for index in prologue:  # execution order: producers first
        direct = {producer[value] for value in by_index[index].inputs if producer.get(value, -1) in inside}
        needed[index] = frozenset({index}).union(*(needed[other] for other in direct))
    body = [instance for instance in graph.instances if instance.index not in inside]
    place = {instance.index: position for position, instance in enumerate(body)}
    needs, last_use = [], {}
    latest: dict[str, int] = {}
    repeats = []
    for position, instance in enumerate(body):
        wanted: frozenset[int] = frozenset()
        for value in instance.inputs:
            source = producer.get(value)
            if source is None:
                continue
            if source in inside:
                wanted |= needed[source]
            else:
                last_use[value] = position
        needs.append(wanted)
        for name in dict.fromkeys(instance.params):
            name = graph.tied.get(name, name)
            if name in latest:
                repeats.append((latest[name], position, name))
            latest[name] = position
    spans = tuple(
        (value, place[producer[value]], position, _has_gradient(graph, value))
        for value, position in last_use.items()
        if place[producer[value]] < position
    )
    lasting = {value for value, source in producer.items() if source in inside}  # counted with the prologue
    return Shape(
        tuple(instance.index for instance in body),
        tuple(instance.segment for instance in body),
        tuple(prologue),
        tuple(needs),
        spans,
        tuple(repeats),
        tuple(tuple("" if v in lasting or v not in producer else v for v in instance.inputs) for instance in body),
    )


def _has_gradient(graph: ModelGraph, value: str) -> bool:
    info = graph.values.get(value)
    return info is None or info.requires_grad


def prefix_sums(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])


def interval_sums(values: np.ndarray) -> np.ndarray:
    """[i, j] -> sum of values[i:j], for 0 <= i <= j <= n; below the diagonal: negative sums, never read."""
    prefix = prefix_sums(values)
    return prefix[None, :] - prefix[:, None]


def interval_maxima(values: np.ndarray) -> np.ndarray:
    """[i, j] -> max of values[i:j], 0 where empty."""
    n = len(values)
    table = np.zeros((n + 1, n + 1))
    for i in range(n):
        table[i, i + 1 :] = np.maximum.accumulate(values[i:])
    return table


SMALL_TENSORS_BYTES = 4096  # of a stage: losses, keys of the generator, the optimizer's counts of steps

# What the backward makes again: of each position the place in its segment's recompute_points, or KEPT.
Recompute = tuple[int, ...]
KEPT = -1
NOTHING: Recompute = ()  # at no position


def recompute_of(levels: Iterable[int]) -> Recompute:
    """levels: of each position."""
    found = tuple(levels)
    return found if any(level != KEPT for level in found) else NOTHING


def levels_of(shape: Shape, recompute: Recompute) -> Recompute:
    """Of each position, also where nothing is made again."""
    return recompute or (KEPT,) * len(shape.segments)


def everywhere(shape: Shape, levels: Mapping[str, int]) -> Recompute:
    """The same at all positions of a segment. levels: by distinct segment."""
    return recompute_of(levels.get(name, KEPT) for name in shape.segments)


def whole_segments(shape: Shape, solution: ShardingSolution, names: Iterable[str] | None = None) -> Recompute:
    """Their whole forward runs again. names: all segments where not given."""
    points = {name: solution.costs[name].recompute_points for name in (shape.segments if names is None else names)}
    return everywhere(shape, {n: next(k for k, p in enumerate(found) if p.is_whole) for n, found in points.items()})


def leanest_segments(shape: Shape, solution: ShardingSolution) -> Recompute:
    """As much runs again as leaves the fewest bytes."""
    points = {name: solution.costs[name].recompute_points for name in shape.segments}
    return everywhere(
        shape, {name: min(range(len(found)), key=lambda k: found[k].saved_bytes) for name, found in points.items()}
    )


def points_of(shape: Shape, solution: ShardingSolution, recompute: Recompute) -> list[RecomputePoint | None]:
    """Of each position; None where everything is kept."""
    return [
        None if level == KEPT else solution.costs[name].recompute_points[level]
        for name, level in zip(shape.segments, levels_of(shape, recompute), strict=True)
    ]


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Chain:
    """Per microbatch and rank, under one sharding and one choice of what to recompute. Arrays of length n (cuts: n+1).

    Seconds include the collectives inside the segments; *_comm_s say how much of them that is. backward_input_s
    includes recomputation.
    """

    shape: Shape
    forward_s: np.ndarray
    backward_input_s: np.ndarray
    backward_weight_s: np.ndarray
    forward_comm_s: np.ndarray
    backward_comm_s: np.ndarray
    activation_bytes: np.ndarray
    forward_workspace_bytes: np.ndarray  # inside a forward, beyond what positions up to this one keep
    written_workspace_bytes: np.ndarray  # inside a backward whose gradients of parameters are written in their place
    made_workspace_bytes: np.ndarray  # the same where they are made first and added up later
    end_workspace_bytes: np.ndarray  # at the end of such a backward
    param_elements: np.ndarray
    trainable_elements: np.ndarray
    summed_elements: np.ndarray  # of those: gradients are partial sums over the tensor axis
    expert_elements: np.ndarray  # of the trainable: experts that are cut over data ranks
    buffer_bytes: np.ndarray
    cut_forward_bytes: np.ndarray  # sent over cut k, between positions k-1 and k
    cut_backward_bytes: np.ndarray
    prologue_s: dict[int, float]
    prologue_bytes: dict[int, int]
    repeats: tuple[Repeat, ...]
    shared: tuple[Shared, ...]
    model_flops: float  # of one rank, one microbatch, all instances

    @property
    def num_instances(self) -> int:
        return len(self.forward_s)

    @cached_property
    def backward_s(self) -> np.ndarray:
        return self.backward_input_s + self.backward_weight_s

    @cached_property
    def forward_of(self) -> np.ndarray:
        """[i, j] -> seconds of a forward over positions i..j-1."""
        return interval_sums(self.forward_s)

    @cached_property
    def backward_of(self) -> np.ndarray:
        return interval_sums(self.backward_s)

    @cached_property
    def activation_of(self) -> np.ndarray:
        """[i, j] -> bytes that a stage of positions i..j-1 keeps of a microbatch."""
        return self.kept_of + self.prologue_bytes_of

    @cached_property
    def kept_of(self) -> np.ndarray:
        """[i, j] -> of the positions themselves."""
        table = interval_sums(self.activation_bytes)
        for value in self.shared:  # of stages that begin behind the first position that keeps it
            table[value.earlier + 1 : value.later + 1, value.later + 1 :] += value.num_bytes
        return table

    @cached_property
    def prologue_bytes_of(self) -> np.ndarray:
        """[i, j] -> values of the prologue that they need."""
        count = self.num_instances
        starts, table = np.arange(count + 1)[:, None], np.zeros((count + 1, count + 1))
        for index, num_bytes in self.prologue_bytes.items():
            needed = [-1, *(k if index in needs else -1 for k, needs in enumerate(self.shape.needs))]
            table[starts <= np.maximum.accumulate(needed)[None, :]] += num_bytes
        return table

    @cached_property
    def param_of(self) -> np.ndarray:
        return self._without_repeats(self.param_elements, "elements")

    @cached_property
    def trainable_of(self) -> np.ndarray:
        return self._without_repeats(self.trainable_elements, "trainable")

    @cached_property
    def summed_of(self) -> np.ndarray:
        return interval_sums(self.summed_elements)

    @cached_property
    def expert_of(self) -> np.ndarray:
        return interval_sums(self.expert_elements)

    def stepped(self, start: int, stop: int, extent: int, expert_ranks: int) -> float:
        """Elements that a rank steps over, whose optimizer's state is split over `extent` ranks."""
        trained, experts = self.trainable_of[start, stop], self.expert_of[start, stop]
        return float(held_elements(trained, experts, extent, expert_ranks)) / extent

    @cached_property
    def largest_of(self) -> np.ndarray:
        return interval_maxima(self.param_elements)

    @cached_property
    def largest_trainable_of(self) -> np.ndarray:
        return interval_maxima(self.trainable_elements)

    @cached_property
    def buffer_of(self) -> np.ndarray:
        return interval_sums(self.buffer_bytes) + SMALL_TENSORS_BYTES

    def _without_repeats(self, values: np.ndarray, kind: str) -> np.ndarray:
        """A parameter read twice within a stage is held once."""
        table = interval_sums(values)
        for repeat in self.repeats:
            table[: repeat.earlier + 1, repeat.later + 1 :] -= getattr(repeat, kind)
        return table

    def stage_state(self, start: int, stop: int) -> StageState:
        return StageState(
            math.ceil(self.param_of[start, stop]),
            math.ceil(self.trainable_of[start, stop]),
            int(self.buffer_of[start, stop]),
            math.ceil(self.largest_of[start, stop]),
            math.ceil(self.summed_of[start, stop]),
            math.ceil(self.largest_trainable_of[start, stop]),
            expert_elements=math.ceil(self.expert_of[start, stop]),
        )

    def prologue_of(self, start: int, stop: int) -> list[int]:
        """Prologue instances that a stage of these positions runs, in execution order."""
        needed = frozenset[int]().union(*self.shape.needs[start:stop])
        return [index for index in self.shape.prologue if index in needed]


@dataclass(frozen=True)
class Between:
    """Two chains of the same placements: a share of what the upper one recomputes more is recomputed."""

    lower: Chain
    upper: Chain
    share: float


def build_chain(
    graph: ModelGraph, shape: Shape, solution: ShardingSolution, recompute: Recompute, compute_scale: float = 1.0
) -> Chain:
    """compute_scale: slower (or faster) device."""
    costs = [solution.costs[name] for name in shape.segments]
    points = points_of(shape, solution, recompute)
    again = np.array([point is not None for point in points])
    again_s = np.array([point.forward_s * compute_scale if point else 0.0 for point in points])
    again_comm = np.array([point.forward_comm_s if point else 0.0 for point in points])

    def column(name: str) -> np.ndarray:
        return np.array([getattr(cost, name) for cost in costs], dtype=float)

    forward_comm, backward_comm = column("forward_comm_s"), column("backward_comm_s")
    forward_compute = column("forward_s") * compute_scale
    forward = forward_compute + forward_comm
    weight = column("backward_weight_s") * compute_scale
    # a backward that runs the forward again is one piece, whatever the schedule
    backward_input = column("backward_input_s") * compute_scale + backward_comm + np.where(again, weight, 0.0)
    backward_input = backward_input + again_s + again_comm
    kept = np.array([cost.saved_bytes if p is None else p.saved_bytes for cost, p in zip(costs, points, strict=True)])
    held = [cost.held_at(point) for cost, point in zip(costs, points, strict=True)]
    kept, shared = _kept_once(shape, held, kept.astype(float))
    n = len(costs)
    cuts = {True: np.zeros(n + 2), False: np.zeros(n + 2)}
    for value, start, stop, has_gradient in shape.spans:
        size = solution.boundary_bytes.get(value, 0)
        for direction in (True, False):
            if direction or has_gradient:
                cuts[direction][start + 1] += size
                cuts[direction][stop + 1] -= size
    passing, waiting = _passing(shape, solution, held)
    by_index = {instance.index: instance for instance in graph.instances}
    prologue_costs = {index: solution.costs[by_index[index].segment] for index in shape.prologue}
    share = {
        name: _share_of(graph, name, solution) for name in {shape.segments[later] for _, later, _ in shape.repeats}
    }
    repeats = []
    for earlier, later, name in shape.repeats:
        dims, _, trainable = graph.params[name]
        elements = math.prod(dims) * share[shape.segments[later]]
        repeats.append(Repeat(earlier, later, elements, elements if trainable else 0.0))
    return Chain(
        shape=shape,
        forward_s=forward,
        backward_input_s=backward_input,
        backward_weight_s=np.where(again, 0.0, weight),
        forward_comm_s=forward_comm,
        backward_comm_s=backward_comm + again_comm,
        activation_bytes=kept,
        forward_workspace_bytes=np.array([each.forward for each in held]) + passing,
        written_workspace_bytes=np.array([each.backward for each in held]) + waiting,
        made_workspace_bytes=np.array([each.backward_made for each in held]) + waiting,
        end_workspace_bytes=np.array([each.end for each in held]) + waiting,
        param_elements=column("param_elements"),
        trainable_elements=column("trainable_elements"),
        summed_elements=column("summed_elements"),
        expert_elements=column("expert_elements"),
        buffer_bytes=column("buffer_bytes"),
        cut_forward_bytes=np.cumsum(cuts[True])[: n + 1],
        cut_backward_bytes=np.cumsum(cuts[False])[: n + 1],
        prologue_s={index: cost.forward_s * compute_scale for index, cost in prologue_costs.items()},
        prologue_bytes={index: max(cost.output_bytes, cost.saved_bytes) for index, cost in prologue_costs.items()},
        repeats=tuple(repeats),
        shared=shared,
        model_flops=sum(cost.model_flops for cost in costs),
    )


def _kept_once(shape: Shape, held: Sequence[Workspace], kept: np.ndarray) -> tuple[np.ndarray, tuple[Shared, ...]]:
    """(bytes that each position keeps and none before it, values that several keep)."""
    latest: dict[str, int] = {}
    shared = []
    for position, (names, each) in enumerate(zip(shape.reads, held, strict=False)):
        for name, num_bytes in zip(names, each.kept_inputs, strict=False):
            if not num_bytes:
                continue
            if name in latest:
                shared.append(Shared(latest[name], position, float(num_bytes)))
            if not name or name in latest:
                kept[position] -= num_bytes
            if name:
                latest[name] = position
    return np.maximum(kept, 0.0), tuple(shared)


def _passing(shape: Shape, solution: ShardingSolution, held: Sequence[Workspace]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that wait, beside each position, for positions behind it: values that nothing has kept yet, in its forward,
    and gradients of values, in its backward."""
    first_kept: dict[str, int] = {}
    for position, (names, each) in enumerate(zip(shape.reads, held, strict=False)):
        for name, num_bytes in zip(names, each.kept_inputs, strict=False):
            if num_bytes:
                first_kept.setdefault(name, position)
    values, gradients = np.zeros(len(held)), np.zeros(len(held))
    for value, start, stop, has_gradient in shape.spans:
        size = solution.boundary_bytes.get(value, 0)
        values[start + 1 : min(stop, first_kept.get(value, stop))] += size
        if has_gradient:
            gradients[start + 1 : stop] += size
    return values, gradients


def _share_of(graph: ModelGraph, segment: str, solution: ShardingSolution) -> float:
    """Share of a segment's parameter elements that one tensor rank holds; at most 1, so that no stage is undercounted
    by more than a sharded copy of what it reads twice."""
    total = sum(math.prod(dims) for dims in graph.segments[segment].param_shapes)
    return min(1.0, solution.costs[segment].param_elements / total) if total else 1.0
