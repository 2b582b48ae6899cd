"""Which collectives the placements of a segment ask for, and for whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from ...ops.placement import Places, R, transition, way
from ...ops.strategy import Strategy
from ...plans.placements import AxisSolution
from ...profiler.graph import Segment
from ...profiler.op_view import origin
from ...profiler.slots import UPDATE, kind_of
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


@dataclass
class Route:
    """One result from one placement to another, in one phase; readers: the ops that ask for it."""

    source: fx.Node
    output: int
    before: Places
    after: Places
    phase: str
    moves: list[Move]
    readers: list[fx.Node] = field(default_factory=list)


def moves(placed: Placed) -> list[Move]:
    """Every collective that the solution needs in the segment, each once."""
    return [move for route in routes(placed) for move in route.moves]


def routes(placed: Placed) -> list[Route]:
    """Every way that the solution needs in the segment, each once."""
    found: dict[tuple[str, Places, Places, str], Route] = {}

    def add(source: fx.Node, output: int, before: Places, after: Places, phase: str, reader: fx.Node | None) -> None:
        key = (f"{source.name}.{output}", before, after, phase)
        if before == after:
            return
        if key not in found:
            steps = _steps(placed, source, output, before, after, phase)
            found[key] = Route(source, output, before, after, phase, steps)
        if reader is not None:
            found[key].readers.append(reader)

    for node, view in placed.facts.views.items():
        phase = node.meta.get("phase", "forward")
        strategies = placed.strategies(node)
        for position, operand in enumerate(view.operands):
            source, output = origin(operand)
            base = placed.read_from(source, output, phase)
            shared = placed.shared(source, output, phase)
            if shared is not None:
                add(source, output, base, shared, phase, node)
                base = shared
            add(source, output, base, tuple(s.inputs[position] for s in strategies), phase, node)
    for key, (source, output), phase in placed.facts.results:
        target = placed.at(key)
        if target is None and kind_of(key) == UPDATE:
            target = (R,) * len(placed.solutions)
        if target is not None:
            add(source, output, placed.made(source, output), target, phase, None)
    return list(found.values())


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
