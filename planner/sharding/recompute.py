"""What of a segment the backward makes again: the frontier of seconds spent and bytes kept, under given placements.

A unit (recompute_cut.py) is an op of the forward, or the collectives that bring a result into the form that is kept for
the backward. Where an op runs again, so do the collectives that bring its operands to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import fx

from ...costmodel.segment import RecomputePoint
from ...plans.placements import kept_key
from ...profiler.op_view import origin
from ...profiler.slots import INPUT, kind_of
from ...profiler.work import is_free, is_view
from .expert_sends import Sent
from .lifetimes import Result
from .recompute_cut import Choice, Unit, Values
from .routes import Placed, Route

EDGE = 1e-6  # of a product of seconds and bytes: closer to the line is on it


@dataclass
class _Made(Unit):
    """compute_s: without collectives. own_comm_s: of the collectives that it is. readers: ops whose operands must be
    moved for it."""

    compute_s: float = 0.0
    own_comm_s: float = 0.0
    readers: list[fx.Node] = field(default_factory=list)


class Recomputation:
    """Units and values of a segment. op_s: of the forward's ops. collective_s: of a route's collectives. experts: what
    messages add to expert ops, and their tokens that stay for the backward."""

    def __init__(
        self,
        placed: Placed,
        op_s: Mapping[fx.Node, float],
        routes: Collection[Route],
        collective_s: Callable[[Route], float],
        experts: tuple[Mapping[fx.Node, float], Collection[Sent]] = ({}, ()),
    ) -> None:
        self.placed, self.op_s = placed, op_s
        self.route_s = [(route, collective_s(route)) for route in routes if route.phase == "forward"]
        self.units: dict[str, _Made] = {}
        self.num_bytes: dict[str, float] = {}  # of each value
        self.made_by: dict[str, str] = {}  # value -> unit; none for the segment's inputs
        self.result_of: dict[str, Result] = {}  # of each value
        self.needed: dict[str, None] = {}  # values that the backward reads
        self._of_forms: set[int] = set()  # routes that are units of their own
        self.moved_s, self._sent = experts[0], {each.key: each for each in experts[1]}
        moving = {reader for route, _ in self.route_s for reader in route.readers}
        for node in placed.facts.views:
            if node.meta.get("phase") == "backward":
                for operand in node.all_input_nodes:
                    if operand.meta.get("phase") != "backward":
                        self._need(operand, moving)
        for key, each in self._sent.items():  # the backward has at hand what it sends again
            self.units[key] = _Made(own_comm_s=each.again_s)
            self.num_bytes[key], self.made_by[key], self.needed[key] = each.num_bytes, key, None
        self._routes_of: dict[fx.Node, list[int]] = {}
        for k, (route, _) in enumerate(self.route_s):
            for reader in route.readers if k not in self._of_forms else ():
                self._routes_of.setdefault(reader, []).append(k)
        for unit in self.units.values():
            unit.seconds = unit.compute_s + self._comm_s([unit])
        self.values = Values(self.units, self.num_bytes, self.made_by, self.needed)

    def _need(self, operand: fx.Node, moving: Collection[fx.Node]) -> None:
        """The views through which the backward reads a value run again with what makes it; where they bring it into
        another placement, it is kept in that. moving: ops whose operands are brought into other placements."""
        passed: list[fx.Node] = []
        if value := self._value(operand, passed):
            self.needed[value] = None
            if any(node in moving for node in passed):
                self.num_bytes[value] = self.placed.local_bytes(*origin(operand))
            if unit := self.units.get(self.made_by.get(value, "")):
                unit.readers += [node for node in passed if node not in unit.readers]

    # ------------------------------------------------------------------ units

    def _value(self, node: fx.Node, passed: list[fx.Node]) -> str:
        """What must be at hand to read this node; "" for what is in any case. passed: gets the ops on the way, which
        run again with the reader."""
        source, output = origin(node)
        return self._form(source, output) or self._base(source, output, passed)

    def _form(self, source: fx.Node, output: int) -> str:
        """The form in which it is kept for the backward; "" where that is the producer's own."""
        key, made = kept_key(source.name, output), self.placed.made(source, output)
        shared = self.placed.shared(source, output, "forward")
        if self.placed.at(key) is None or shared is None or shared == made or source.meta.get("phase") == "backward":
            return ""
        if key not in self.units:
            unit = self.units[key] = _Made()
            self.result_of[key] = source, output
            self.num_bytes[key], self.made_by[key] = self.placed.local_bytes(source, output, shared), key
            for k, (route, seconds) in enumerate(self.route_s):
                if (route.source, route.output, route.before, route.after) == (source, output, made, shared):
                    unit.own_comm_s += seconds
                    self._of_forms.add(k)
            unit.reads = [value for value in [self._base(source, output, unit.readers)] if value]
        return key

    def _base(self, source: fx.Node, output: int, passed: list[fx.Node]) -> str:
        """What a result is, or views."""
        if source.op == "placeholder":
            return self._input(source)
        if not (is_free(source) or is_view(source)):
            return self._result(source, output)
        passed.append(source)
        tensors = self.placed.facts.views[source].operands
        return self._value(tensors[0], passed) if tensors else ""

    def _input(self, node: fx.Node) -> str:
        if kind_of(node.name) != INPUT:
            return ""
        self.num_bytes[node.name], self.result_of[node.name] = self.placed.local_bytes(node, 0), (node, 0)
        return node.name

    def _result(self, node: fx.Node, output: int) -> str:
        value = f"{node.name}.{output}"
        self.result_of[value] = node, output
        self.num_bytes[value], self.made_by[value] = self.placed.local_bytes(node, output), node.name
        if node.name not in self.units:
            unit = self.units[node.name] = _Made(
                compute_s=self.op_s.get(node, 0.0), own_comm_s=self.moved_s.get(node, 0.0), readers=[node]
            )
            read = [self._value(operand, unit.readers) for operand in self.placed.facts.views[node].operands]
            unit.reads = [name for name in dict.fromkeys(read) if name]
        return value

    # ------------------------------------------------------------------ points

    def _comm_s(self, units: Collection[_Made]) -> float:
        """A route that several of them ask for is taken once."""
        asked = {k for unit in units for reader in unit.readers for k in self._routes_of.get(reader, ())}
        return sum(self.route_s[k][1] for k in asked) + sum(unit.own_comm_s for unit in units)

    def kept(self, choice: Collection[str]) -> frozenset[Result]:
        """What stays from the forward to the backward under a choice."""
        return frozenset(self.result_of[value] for value in self.values.walk(choice)[1] if value not in self._sent)

    def point(self, choice: Choice, *, is_whole: bool = False) -> RecomputePoint:
        """The figures of a choice; saved_bytes: less what is kept where nothing runs again, 0 for nothing."""
        again, kept = self.values.walk(self.units.keys() if is_whole else choice)
        units = [self.units[name] for name in again if not self._comes_along(name, again)]
        freed = sum(self.num_bytes[name] for name in self.needed) - sum(self.num_bytes[name] for name in kept)
        names = () if is_whole else tuple(sorted(again))
        return RecomputePoint(names, sum(unit.compute_s for unit in units), self._comm_s(units), -int(freed), is_whole)

    def _comes_along(self, name: str, again: Collection[str]) -> bool:
        """Are they tokens that the experts' own forward brings, which runs again?"""
        return name in self._sent and self._sent[name].forward.name in again


def hull(points: Collection[RecomputePoint]) -> Iterator[RecomputePoint]:
    """Those on the lower convex hull of (seconds, bytes) that begins at nothing run again, nothing freed; also those on
    its edges."""
    kept: list[tuple[float, float, RecomputePoint | None]] = [(0.0, 0.0, None)]
    for point in sorted(points, key=lambda point: (point.seconds, point.saved_bytes)):
        if point.saved_bytes >= kept[-1][1]:
            continue
        while len(kept) > 1 and _is_above(kept[-2], kept[-1], point):
            kept.pop()
        kept.append((point.seconds, point.saved_bytes, point))
    return iter([point for _, _, point in kept if point is not None])


def _is_above(
    first: tuple[float, float, RecomputePoint | None],
    middle: tuple[float, float, RecomputePoint | None],
    last: RecomputePoint,
) -> bool:
    """By more than rounding."""
    through = (last.saved_bytes - first[1]) * (middle[0] - first[0])
    return (middle[1] - first[1]) * (last.seconds - first[0]) > through + EDGE * abs(through)
