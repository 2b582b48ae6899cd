"""What one distinct segment costs on one rank under given placements: seconds of compute and of collectives, bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from ...costmodel.segment import SegmentCost
from ...ops.placement import P, Places, R, transition, way
from ...ops.strategy import Strategy
from ...plans.placements import AxisSolution
from ...profiler.graph import Segment
from ...profiler.op_view import origin
from .mesh import Mesh
from .segment_facts import SegmentFacts


@dataclass(frozen=True)
class Move:
    """A collective that the solution asks for on one axis. full_bytes: of the tensor whole on that axis, as the other
    axes have it. node: whose result moves."""

    axis: str
    kind: str
    full_bytes: float
    phase: str
    node: str


@dataclass(frozen=True)
class Placed:
    """A segment with its placements on a mesh."""

    segment: Segment
    mesh: Mesh
    solutions: tuple[AxisSolution, ...]
    known: SegmentFacts | None = None  # of the segment, where others need them too

    @cached_property
    def facts(self) -> SegmentFacts:
        return self.known or SegmentFacts(self.segment)

    def strategies(self, node: fx.Node) -> tuple[Strategy, ...]:
        return tuple(s.strategies[(self.segment.name, node.name)] for s in self.solutions)

    def made(self, source: fx.Node, output: int) -> Places:
        return tuple(s.of_result(self.segment.name, source, output) for s in self.solutions)

    def read_from(self, source: fx.Node, output: int, phase: str) -> Places:
        return tuple(s.read_from(self.segment.name, source, output, phase) for s in self.solutions)

    def shared(self, source: fx.Node, output: int, phase: str) -> Places | None:
        return self.at(f"{source.name}.{output}>{phase}")

    def at(self, key: str) -> Places | None:
        if (self.segment.name, key) not in self.solutions[0].places:
            return None
        return tuple(s.places[(self.segment.name, key)] for s in self.solutions)

    def kept(self, source: fx.Node, output: int) -> Places:
        """Placement of what the backward keeps of a result."""
        return self.read_from(source, output, "backward")

    def local_bytes(self, source: fx.Node, output: int, places: Places | None = None) -> float:
        return self.mesh.local_bytes(source, output, places if places is not None else self.made(source, output))


def moves(placed: Placed) -> list[Move]:
    """Every collective that the solution needs in the segment, each once."""
    found: dict[tuple[str, Places, Places, str], list[Move]] = {}

    def add(source: fx.Node, output: int, before: Places, after: Places, phase: str) -> None:
        key = (f"{source.name}.{output}", before, after, phase)
        if before != after and key not in found:
            found[key] = _steps(placed, source, output, before, after, phase)

    for node, view in placed.facts.views.items():
        phase = node.meta.get("phase", "forward")
        strategies = placed.strategies(node)
        for position, operand in enumerate(view.operands):
            source, output = origin(operand)
            base = placed.read_from(source, output, phase)
            shared = placed.shared(source, output, phase)
            if shared is not None:
                add(source, output, base, shared, phase)
                base = shared
            add(source, output, base, tuple(s.inputs[position] for s in strategies), phase)
    for key, (source, output), phase in placed.facts.results:
        target = placed.at(key)
        if target is None and key.startswith("update_"):
            target = (R,) * len(placed.solutions)
        if target is not None:
            add(source, output, placed.made(source, output), target, phase)
    return [move for listed in found.values() for move in listed]


def _steps(placed: Placed, source: fx.Node, output: int, before: Places, after: Places, phase: str) -> list[Move]:
    """One move for each collective of the route."""
    mesh, current, found = placed.mesh, list(before), []
    num_bytes = mesh.sizes(source, output).num_bytes
    wide = [axis.size > 1 for axis in mesh.axes]
    start, end = (tuple(p if w else R for p, w in zip(places, wide, strict=True)) for places in (before, after))
    current = list(start)
    for k, place, target in way(start, end) or ():
        kind = transition(place, target)
        current[k] = R
        if kind not in ("", "local", None):
            full = num_bytes / mesh.shares(tuple(current))
            found.append(Move(mesh.axes[k].name, kind, full, phase, source.name))  # type: ignore[arg-type]
        current[k] = target
    return found


def evaluate(placed: Placed) -> SegmentCost:
    segment, mesh, facts = placed.segment, placed.mesh, placed.facts
    seconds: dict[str, float] = defaultdict(float)
    flops = 0.0
    scratch: dict[fx.Node, float] = {}
    lasting = 0.0  # what an op leaves for the next of its kind: one at a time
    for node, part in facts.parts.items():
        share, moved = op_load(placed, node)
        seconds[part] += mesh.op_s(node, share, moved)
        flops += facts.model_flops.get(node, 0.0) * share
        scratch[node], left = mesh.scratch_of(node, share, lambda operand: placed.local_bytes(*origin(operand)))
        lasting = max(lasting, left)
    by_axis = {axis.name: axis for axis in mesh.axes}
    comm: dict[str, float] = defaultdict(float)
    for move in moves(placed):
        comm[move.phase] += by_axis[move.axis].collective_s(move.kind, move.full_bytes)

    def local(node: fx.Node, output: int = 0) -> float:
        return placed.local_bytes(node, output)

    placeholders = facts.placeholders
    params = [placeholders[f"param_{i}"] for i in range(len(segment.param_shapes))]
    elements = [local(n) / n.meta["val"].element_size() for n in params]
    trained = [e if t else 0.0 for e, t in zip(elements, segment.param_requires_grad, strict=True)]
    inputs = [placeholders[f"input_{i}"] for i in range(len(segment.inputs))]
    return SegmentCost(
        forward_s=seconds["F"],
        backward_input_s=seconds["I"],
        backward_weight_s=seconds["W"],
        forward_comm_s=comm["forward"],
        backward_comm_s=comm["backward"],
        param_elements=int(sum(elements)),
        trainable_elements=int(sum(trained)),
        buffer_bytes=int(sum(local(n) for name, n in placeholders.items() if name.startswith("buffer_"))),
        saved_bytes=int(sum(placed.local_bytes(*s, placed.kept(*s)) for s in facts.saved)),
        recompute_saved_bytes=int(sum(local(n) for n in inputs if n.meta["val"].is_floating_point())),
        input_bytes=int(sum(local(n) for n in inputs)),
        output_bytes=int(sum(local(*o) for o in facts.outputs)),
        workspace_bytes=int(_workspace(facts, local, scratch) + lasting),
        model_flops=flops,
        summed_elements=int(sum(e for i, e in enumerate(trained) if is_summed(placed, i))),
    )


def is_summed(placed: Placed, slot: int) -> bool:
    """Does the gradient of a parameter leave the segment as a partial sum over an axis on which not all do?"""
    return any(partial_axes(placed, slot))


def partial_axes(placed: Placed, slot: int) -> tuple[bool, ...]:
    """Those axes, among all of the mesh."""
    axes = placed.mesh.axes
    places = placed.at(f"param_grad_{slot}") or (R,) * len(axes)
    return tuple(p == P and axis.size > 1 and not axis.role.grads_partial for p, axis in zip(places, axes, strict=True))


def op_load(placed: Placed, node: fx.Node) -> tuple[float, float]:
    """(share of the captured op's flops, bytes read and written) on one rank."""
    view, mesh, strategies = placed.facts.views[node], placed.mesh, placed.strategies(node)
    moved, batched = 0.0, False
    for k, operand in enumerate(view.operands):
        sizes = mesh.sizes(*origin(operand))
        batched = batched or any(sizes.batched)
        moved += sizes.num_bytes / mesh.shares(tuple(s.inputs[k] for s in strategies))
    for k in range(len(view.outputs)):
        sizes = mesh.sizes(node, k)
        batched = batched or any(sizes.batched)
        moved += sizes.num_bytes / mesh.shares(tuple(s.outputs[k] for s in strategies))
    return mesh.share(strategies, batched), moved


def _workspace(
    facts: SegmentFacts, local_bytes: Callable[[fx.Node, int], float], scratch: Mapping[fx.Node, float]
) -> float:
    """Most bytes alive at once inside one backward (or forward), beyond what is saved, by last use.

    scratch: what an op holds while it runs.
    """
    alive = peak = 0.0
    for node, made, dying in facts.lifetimes:
        for key in made:
            alive += local_bytes(*key)
        peak = max(peak, alive + scratch.get(node, 0.0))
        for key in dying:
            alive -= local_bytes(*key)
    return peak
