"""Variables that distinct segments share: boundary values, their gradients, parameters.

A segment is stored once and rewritten once, so slots that ever hold the same value or parameter are one variable.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import fx

from ...ops.placement import Places, R
from ...profiler.graph import ModelGraph, Segment
from ...profiler.joint import flatten_outputs
from ...profiler.op_view import origin
from ...profiler.slots import INPUT, PARAM, TANGENT, slot_name
from .mesh import Mesh
from .pins import cannot_meet
from .variables import STATE, Build, Demands, add_weight, meets, place_variable, texts_of


class _Union:
    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}

    def find(self, key: Any) -> Any:
        self.parent.setdefault(key, key)
        while self.parent[key] != key:
            self.parent[key] = self.parent[self.parent[key]]
            key = self.parent[key]
        return key

    def join(self, a: Any, b: Any) -> None:
        self.parent[self.find(a)] = self.find(b)


def _placeholder(segment: Segment, name: str) -> fx.Node:
    return next(n for n in segment.joint.graph.nodes if n.op == "placeholder" and n.name == name)


def add_boundaries(graph: ModelGraph, mesh: Mesh, made: Build, demands: Demands) -> None:
    """One variable for each class of values, and one for each class of their gradients."""
    values, gradients = _Union(), _Union()
    for instance in graph.instances:
        segment = graph.segments[instance.segment]
        for i, name in enumerate(instance.inputs):
            values.join(("value", name), (segment.name, "in", i))
            if graph.values[name].requires_grad:
                gradients.join(("gradient", name), (segment.name, "gin", i))
        for j, name in enumerate(instance.outputs):
            values.join(("value", name), (segment.name, "out", j))
            if graph.values[name].requires_grad:
                gradients.join(("gradient", name), (segment.name, "tan", j))
    whole = (R,) * len(mesh.axes)
    inputs = {values.find(("value", name)): name for name in graph.input_names}
    losses = {values.find(("value", graph.loss)), gradients.find(("gradient", graph.loss))}
    for union, kinds in ((values, ("in", "out")), (gradients, ("gin", "tan"))):
        classes: dict[Any, int] = {}
        for key in list(union.parent):
            if len(key) != 3 or key[1] not in kinds:
                continue
            root = union.find(key)
            if root not in classes:
                sizes = mesh.sizes(*origin(_boundary_node(graph, key)))
                if root in losses:
                    options = [whole]
                elif root in inputs:
                    options = [demands.inputs(inputs[root], sizes)]
                else:
                    options = mesh.between(sizes, partial=kinds[0] == "gin")
                classes[root] = place_variable(made, options, ("boundary", key))
            made.slot_vars[key] = classes[root]


def _boundary_node(graph: ModelGraph, key: tuple[str, str, int]) -> fx.Node:
    segment = graph.segments[key[0]]
    if key[1] in ("in", "gin"):
        return _placeholder(segment, slot_name(INPUT, key[2]))
    if key[1] == "tan":
        return _placeholder(segment, slot_name(TANGENT, segment.signature.tangents.index(key[2])))
    return flatten_outputs(segment.joint.graph)[key[2]]


def add_params(graph: ModelGraph, mesh: Mesh, made: Build, demands: Demands) -> None:
    union = _Union()
    names: dict[Any, list[str]] = defaultdict(list)
    counts: dict[Any, int] = defaultdict(int)
    for instance in graph.instances:
        for i, name in enumerate(instance.params):
            union.join(("param", name), (instance.segment, "param", i))
    for key in list(union.parent):
        if key[0] == "param" and len(key) == 2:
            names[union.find(key)].append(key[1])
            counts[union.find(key)] += 1
    classes: dict[Any, int] = {}
    for key in list(union.parent):
        if len(key) != 3:
            continue
        root = union.find(key)
        if root not in classes:
            sizes = mesh.sizes(_placeholder(graph.segments[key[0]], slot_name(PARAM, key[2])))
            options = mesh.domain(sizes, partial=False, is_param=True)
            options = _demanded(options, names[root], demands)
            classes[root] = place_variable(made, options, ("param", key))
            held = counts[root] * mesh.state_bytes(sizes, graph.segments[key[0]].param_requires_grad[key[2]])
            add_weight(made, classes[root], STATE, [held / mesh.shares(p) for p in options])
        made.slot_vars[key] = classes[root]


def _demanded(options: list[Places], names: list[str], demands: Demands) -> list[Places]:
    """Places of a parameter that meet what is demanded; where a wish cannot be met, as where a dimension does not
    divide, all; where a pin cannot, ShardwrightError."""
    wishes = [demands.params[n] for n in names if n in demands.params]
    options = [o for o in options if all(meets(o, d) for d in wishes)] or options
    pinned = [n for n in names if n in demands.pins.params]
    met = [o for o in options if all(meets(o, demands.pins.params[n]) for n in pinned)]
    if not met:
        raise cannot_meet(demands.pins.pins.get(pinned[0]), f"{pinned[0]} cannot lie so", texts_of(options))
    return met
