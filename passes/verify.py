"""Proof that a built segment holds the collectives that its placements imply: these, of these bytes, and no others.

What is expected is read off the placements alone, as the planner counts (planner/sharding/cost.py): one collective
for each step of each route that some reader or result asks for, once in a phase, and those inside the lowerings. What
is there is read off the finished graphs. build runs this on every segment; a difference is a mistake of a pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ..kernels.attention import attention_backward
from ..ops.lowering import LOWERINGS, AllReduce
from ..ops.placement import R, transition, way
from ..ops.strategy import Strategy
from ..profiler.graph import Segment
from ..profiler.joint import flatten_outputs
from ..profiler.nodes import needed_for
from ..profiler.op_view import is_op, origin, view_of
from ..profiler.signature import results
from ..profiler.slots import UPDATE, kind_of
from .attention_ring import is_zigzag, to_zigzag
from .redistribute import MeshAxis
from .shard import Places, ShardContext, local_shape, whole_on_short
from .values import c10d

# op -> (kind, payload bytes of an operand of so many bytes on an axis of so many ranks)
_KINDS: dict[Any, tuple[str, Any]] = {
    c10d.all_reduce.default: ("all_reduce", lambda num_bytes, ranks: num_bytes),
    c10d.all_reduce_.default: ("all_reduce", lambda num_bytes, ranks: num_bytes),
    c10d.reduce_scatter_tensor.default: ("reduce_scatter", lambda num_bytes, ranks: num_bytes),
    c10d.all_gather_into_tensor.default: ("all_gather", lambda num_bytes, ranks: num_bytes * ranks),
    c10d.all_to_all_single.default: ("all_to_all", lambda num_bytes, ranks: num_bytes * ranks),
}
SENT = "send"  # an exchange of unequal parts: what this rank has of the tensor


class Collective(NamedTuple):
    """num_bytes: of the tensor as it would be whole on this axis, on this rank's shards of the other axes, with what
    pads uneven shards."""

    phase: str  # "forward" or "backward"
    axis: str
    kind: str
    num_bytes: int


def built_collectives(graph: fx.Graph, context: ShardContext, phase: str) -> Iterator[Collective]:
    axes = {axis.group: axis for axis in context.axes if axis.size > 1}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _KINDS:
            kind, payload = _KINDS[node.target]
            axis = axes[node.args[-1]]
            value = node.args[0].meta["val"]
            num_bytes = value.numel() * value.element_size()
            is_even = kind != "all_to_all" or _is_even(*node.args[1:3])
            yield Collective(
                phase, axis.name, *((kind, payload(num_bytes, axis.size)) if is_even else (SENT, num_bytes))
            )


def implied_collectives(segment: Segment, context: ShardContext) -> Iterator[Collective]:
    """Of one run of the segment's forward and, kept tensors at hand, of its backward."""
    implied = _Implied(segment, context)
    yield from implied.moved()
    yield from implied.lowered()


def moved_collectives(segment: Segment, context: ShardContext) -> Iterator[Collective]:
    """Those of them that bring tensors from one placement to another."""
    return _Implied(segment, context).moved()


def totals(collectives: Iterable[Collective]) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(phase, axis, kind) -> (how many, bytes of all)."""
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for phase, axis, kind, num_bytes in sorted(collectives):
        count, total = found.get((phase, axis, kind), (0, 0))
        found[phase, axis, kind] = count + 1, total + num_bytes
    return found


def verify(
    segment: Segment,
    context: ShardContext,
    forward: fx.GraphModule,
    backward: Sequence[fx.GraphModule],
    recompute: bool,
) -> tuple[Collective, ...]:
    """What the graphs hold. Raises AssertionError where that is not what the placements imply.

    backward: one graph, or two that run one after the other.
    recompute: the backward repeats what it needs of the forward, and may leave the forward without what only it needs.
    """
    implied = Counter(implied_collectives(segment, context))
    built = [*built_collectives(forward.graph, context, "forward")]
    for module in backward:
        built += built_collectives(module.graph, context, "backward")
    found = Counter(built)
    if recompute:
        repeats = {c: found[c._replace(phase="backward")] - implied[c._replace(phase="backward")] for c in implied}
        for collective, count in list(implied.items()):
            here, again = found[collective], repeats[collective]
            # each stands in the forward, in the backward, or in both: of several alike, some may have moved
            if collective.phase == "forward" and 0 <= again <= count and here <= count <= here + again:
                found[collective] = count
                found[collective._replace(phase="backward")] -= again
    wrong = {c: (found[c], implied[c]) for c in {*found, *implied} if found[c] != implied[c]}
    assert not wrong, f"{segment.name}: built and implied by the plan: {_listing(wrong)}"
    return tuple(built)


def _listing(wrong: dict[Collective, tuple[int, int]]) -> str:
    rows = (f"{have}, not {want}, x {' '.join(map(str, c))} B" for c, (have, want) in sorted(wrong.items()))
    return "; ".join(rows)


class _Implied:
    def __init__(self, segment: Segment, context: ShardContext) -> None:
        self.segment, self.context, self.axes = segment, context, context.axes
        self.live = needed_for(flatten_outputs(segment.joint.graph))

    def moved(self) -> Iterator[Collective]:
        moves = [
            (source, output, whole_on_short(before, self.axes), whole_on_short(after, self.axes), phase)
            for source, output, before, after, phase in self._moves()
        ]
        for source, output, before, after, phase in dict.fromkeys(moves):
            for kind, axis, shape in self._steps(source, output, before, after):
                yield Collective(phase, axis, kind, math.prod(shape) * _tensor(source, output).element_size())

    def lowered(self) -> Iterator[Collective]:
        """Collectives of the programs that stand in for ops (ops/lowering.py)."""
        for node in filter(is_op, self.segment.joint.graph.nodes):
            if node in self.live:
                yield from self._lowered(node)

    def _moves(self) -> Iterator[tuple[fx.Node, int, Places, Places, str]]:
        """(op, result, placements before and after, phase), repeated where several readers ask for the same."""
        name, solutions = self.segment.name, self.context.solutions
        for node in filter(is_op, self.segment.joint.graph.nodes):
            phase = node.meta.get("phase", "forward")
            strategies = [s.strategies[(name, node.name)] for s in solutions]
            for position, operand in enumerate(view_of(node).operands if node in self.live else ()):
                source, output = origin(operand)
                made = tuple(s.read_from(name, source, output, phase) for s in solutions)
                form = (name, f"{source.name}.{output}>{phase}")
                shared = tuple(s.places.get(form, place) for s, place in zip(solutions, made, strict=True))
                wanted = tuple(s.inputs[position] for s in strategies)
                yield source, output, made, shared, phase
                yield source, output, shared, wanted, phase
        for key, (source, output), phase in results(self.segment):
            made = tuple(s.of_result(name, source, output) for s in solutions)
            default = (R,) * len(made) if kind_of(key) == UPDATE else made
            wanted = tuple(s.places.get((name, key), p) for s, p in zip(solutions, default, strict=True))
            yield source, output, made, wanted, phase

    def _steps(
        self, source: fx.Node, output: int, before: Places, after: Places
    ) -> Iterator[tuple[str, str, list[int]]]:
        """(kind, axis, padded sizes of the tensor whole on that axis) of each collective on the way."""
        current = list(before)
        for k, place, target in way(before, after) or ():
            kind = transition(place, target)
            current[k] = R
            if kind not in ("", "local", None):
                sizes = local_shape(_tensor(source, output).shape, tuple(current), self.axes)
                yield str(kind), self.axes[k].name, _padded(sizes, (place, target), self.axes[k].size)
            current[k] = target

    def _lowered(self, node: fx.Node) -> Iterator[Collective]:
        strategies = [s.strategies[(self.segment.name, node.name)] for s in self.context.solutions]
        phase = node.meta.get("phase", "forward")
        for axis, strategy in zip(self.axes, strategies, strict=True):
            if axis.size == 1 or not strategy.lowering:
                continue
            if strategy.lowering.startswith(("attention_ring", "attention_zigzag")):
                for kind, num_bytes in self._ring(node, strategies, axis):
                    yield Collective(phase, axis.name, kind, num_bytes)
                continue
            read = {origin(user)[1] for user in node.users if user in self.live}
            for one in LOWERINGS[strategy.lowering].all_reduces:
                if one.is_needed(node, read):
                    num_bytes = self._reduced_bytes(node, strategies, one)
                    yield Collective(phase, axis.name, "all_reduce", num_bytes)

    def _ring(self, node: fx.Node, strategies: Sequence[Strategy], axis: MeshAxis) -> Iterator[tuple[str, int]]:
        """(kind, bytes) of what ring attention sends: keys and values n - 1 times, in the backward their gradients n
        times; in zigzag order also what is exchanged for that and back."""
        view, back = view_of(node), int(node.target is attention_backward)
        read = {origin(user)[1] for user in node.users if user in self.live}

        def local(tensor: torch.Tensor, places: Places) -> int:
            return math.prod(local_shape(tensor.shape, places, self.axes)) * tensor.element_size()

        operands = [local(t, tuple(s.inputs[k] for s in strategies)) for k, t in enumerate(view.inputs)]
        results = [
            local(_tensor(node, k), tuple(s.outputs[k] for s in strategies))
            for k in sorted(read)
            if isinstance(_tensor(node, k), torch.Tensor)
        ]
        hops = axis.size - 1 + back * axis.size
        yield from [(SENT, operands[1 + back] + operands[2 + back])] * hops
        num_tokens = view.inputs[back].shape[2]
        if is_zigzag(num_tokens, bool(node.args[9 if back else 6]), axis.size):
            is_even = _is_even(*to_zigzag(axis, num_tokens))
            for num_bytes in (*(operands if back else operands[:3]), *results):
                yield ("all_to_all", num_bytes * axis.size) if is_even else (SENT, num_bytes)

    def _reduced_bytes(self, node: fx.Node, strategies: Sequence[Strategy], one: AllReduce) -> int:
        like = _tensor(node, one.result) if one.operand is None else view_of(node).inputs[one.operand]
        if not one.per_row:
            return like.element_size()
        shape, dim = list(like.shape), len(like.shape)
        if one.dim_at is not None:
            dim = int(node.args[one.dim_at]) % len(shape)  # type: ignore[arg-type]
            shape[dim] = 1
        places = tuple(R if s.outputs[0] == dim else s.outputs[0] for s in strategies)
        return math.prod(local_shape(shape, places, self.axes)) * like.element_size()


def _tensor(node: fx.Node, output: int) -> torch.Tensor:
    value = node.meta["val"]
    return value[output] if isinstance(value, (tuple, list)) else value


def _is_even(come: Sequence[int], go: Sequence[int]) -> bool:
    return len({*come, *go}) == 1


def _padded(sizes: list[int], dims: Iterable[int], ranks: int) -> list[int]:
    return [-(-size // ranks) * ranks if d in dims else size for d, size in enumerate(sizes)]
