"""Which results to make again: the choices on the hull of seconds spent and bytes kept, by minimum cuts.

A unit makes values from values; some values are needed. A choice is a set of units: their values are not kept, and the
unit runs again where they are needed. With a price on a byte the best choice is a minimum cut, as in Chen et al.,
"Training Deep Nets with Sublinear Memory Cost" (2016), and PyTorch's partitioner: for a value a = 1 where it is at
hand, for a unit r = 1 where it runs again; a byte kept costs where a = 1 and r = 0, a second where r = 1; r = 1 asks
for a = 1 of what the unit reads. The prices are the slopes between the points found so far, so that the points are
those of the lower convex hull.

Where one point makes several things again that have nothing to do with each other, as two products of the same operand
are, those that do only some of it stand between: on the hull's edge, which no price tells apart.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import networkx

MAX_CHOICES = 6
MAX_BETWEEN = 12  # with those on its edges
WORTH = 0.02  # of the bytes that can be freed: a choice that frees less than this beyond its neighbour is left out
SCALE = 1e15  # capacities are whole numbers, of this for all seconds and for all bytes together

Choice = frozenset[str]  # names of units


@dataclass
class Unit:
    """seconds: of one more run, alone. reads: values."""

    seconds: float = 0.0
    reads: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """choice: the units that run again, none that need not."""

    choice: Choice
    seconds: float
    num_bytes: float


@dataclass
class Values:
    """num_bytes: of each value. made_by: the unit of each, none where it is given. needed: values."""

    units: Mapping[str, Unit]
    num_bytes: Mapping[str, float]
    made_by: Mapping[str, str]
    needed: Collection[str]

    def walk(self, choice: Collection[str]) -> tuple[dict[str, None], dict[str, None]]:
        """(units that run again, values kept), in an order that does not change from process to process."""
        again: dict[str, None] = {}
        kept: dict[str, None] = {}
        stack = list(self.needed)
        while stack:
            value = stack.pop()
            unit = self.made_by.get(value)
            if unit is None or unit not in choice:
                kept[value] = None
            elif unit not in again:
                again[unit] = None
                stack.extend(self.units[unit].reads)
        return again, kept

    def figures(self, choice: Collection[str]) -> Figures:
        again, kept = self.walk(choice)
        seconds = sum(self.units[name].seconds for name in again)
        return Figures(frozenset(again), seconds, sum(self.num_bytes[name] for name in kept))

    def choices(self) -> list[Choice]:
        """Those of the hull, by seconds, at most MAX_CHOICES; none that frees nothing."""
        first, last = self.figures(()), self.figures(self.cut(seconds=1e-6, per_byte=1.0))
        if last.num_bytes >= first.num_bytes:
            return []
        found, pairs, least = {first.choice: first, last.choice: last}, deque([(first, last)]), last
        while pairs and len(found) <= MAX_CHOICES:
            one, other = pairs.popleft()
            drop, rise = one.num_bytes - other.num_bytes, other.seconds - one.seconds
            if drop < 2 * WORTH * (first.num_bytes - least.num_bytes) or rise <= 0:
                continue
            middle = self.figures(self.cut(seconds=1.0, per_byte=rise / drop))
            below = rise / drop * (one.num_bytes - middle.num_bytes) - (middle.seconds - one.seconds)
            if middle.choice not in found and below > 1e-6 * rise:
                found[middle.choice] = middle
                pairs += [(one, middle), (middle, other)]
        corners = sorted(found.values(), key=lambda each: each.seconds)
        least_bytes = WORTH * (first.num_bytes - least.num_bytes)
        points = [point for pair in itertools.pairwise(corners) for point in self._along(*pair, least_bytes)]
        return [each.choice for each in _thinned(points, corners) if each.choice]

    def _along(self, one: Figures, other: Figures, least_bytes: float) -> list[Figures]:
        """From one corner to the next, without the first: part by part of what the next makes again besides, those
        first that free most for a second. least_bytes: freed by each step but the last."""
        if not one.choice < other.choice:
            return [other]
        parts = [self.figures(one.choice | part) for part in self._parts(other.choice - one.choice)]
        parts.sort(key=lambda each: (each.seconds - one.seconds) / max(one.num_bytes - each.num_bytes, 1e-9))
        found, so_far = [one], one.choice
        for part in parts:
            so_far = so_far | part.choice
            point = self.figures(so_far)
            is_far = found[-1].num_bytes - point.num_bytes >= least_bytes
            if is_far and point.num_bytes - other.num_bytes >= least_bytes and _is_between(found[-1], point, other):
                found.append(point)
        return [*found[1:], other]

    def _parts(self, units: Choice) -> list[Choice]:
        """Of units of which some read what others make, those that hang together."""
        group = networkx.utils.UnionFind(sorted(units))
        for name in sorted(units):
            makers = {self.made_by.get(value) for value in self.units[name].reads}
            group.union(name, *sorted(maker for maker in makers if maker in units))
        return [frozenset(part) for part in group.to_sets()]

    def cut(self, *, seconds: float, per_byte: float) -> Choice:
        """The choice of least seconds * (seconds run again) + per_byte * (bytes kept)."""
        second_costs = {name: seconds * unit.seconds for name, unit in self.units.items()}
        byte_costs = {name: per_byte * num_bytes for name, num_bytes in self.num_bytes.items()}
        total = sum(second_costs.values()) + sum(byte_costs.values())
        scale = SCALE / total if total > 0 else 1.0
        graph = networkx.DiGraph()
        graph.add_nodes_from(["needed", "spent"])
        for value, cost in byte_costs.items():
            maker = self.made_by.get(value)
            made = "spent" if maker is None else ("again", maker)
            graph.add_edge(("at hand", value), made, capacity=round(scale * cost))
        for name, unit in self.units.items():
            graph.add_edge(("again", name), "spent", capacity=round(scale * second_costs[name]))
            graph.add_edges_from((("again", name), ("at hand", value)) for value in unit.reads)
        graph.add_edges_from(("needed", ("at hand", value)) for value in self.needed)
        _, (side, _) = networkx.minimum_cut(graph, "needed", "spent")
        return frozenset(key[1] for key in side if key[0] == "again")


def _is_between(one: Figures, middle: Figures, other: Figures) -> bool:
    """On the line between two, or below it, by more than rounding."""
    drop, rise = one.num_bytes - other.num_bytes, other.seconds - one.seconds
    line = rise * (one.num_bytes - middle.num_bytes)
    return 0 < middle.seconds - one.seconds <= rise and (middle.seconds - one.seconds) * drop <= line * (1 + 1e-9)


def _thinned(points: list[Figures], corners: list[Figures]) -> list[Figures]:
    """At most MAX_BETWEEN: all corners, and of the others those that lie farthest from what stands before them."""
    first = corners[0].num_bytes
    gaps = [
        before - each.num_bytes for before, each in zip([first, *(p.num_bytes for p in points)], points, strict=False)
    ]
    fixed = {corner.choice for corner in corners}
    others = [k for k in range(len(points)) if points[k].choice not in fixed]
    others.sort(key=lambda k: gaps[k], reverse=True)
    chosen = {points[k].choice for k in others[: max(0, MAX_BETWEEN - len(corners))]} | fixed
    return [point for point in points if point.choice in chosen]
