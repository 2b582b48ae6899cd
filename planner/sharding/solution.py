"""AxisSolution: what the solver decided on one mesh axis, and its text form in a plan.

In a plan, placements[segment][key] is a list with one text per axis. Keys are names of joint-graph nodes, with
    "S(0),R->S(0)"            for an op: operands -> results, "@name" appended where it runs a lowering
    "S(1)"                    for a placeholder
and besides them "NODE.K>PHASE" (the form in which result K reaches several readers), "output_J" and "input_grad_I"
(boundary values and gradients), "param_grad_I" ("P": summed by the runtime once a step). "NODE.K>kept" stands where the
backward reads the form that the forward's readers share ("NODE.K>forward"), and not the producer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from ...profiler.graph import ModelGraph, Segment
from ...profiler.joint import flatten_outputs
from .placement import P, Places, R, from_text, to_text
from .problem import COPY, Build, slot_key
from .strategy import Strategy, is_op, origin, replicated, view_of


@dataclass
class AxisSolution:
    """strategies: (segment, op node). places: (segment, key) for every other key of the plan's text form."""

    strategies: dict[tuple[str, str], Strategy] = field(default_factory=dict)
    places: dict[tuple[str, str], int] = field(default_factory=dict)

    def of_result(self, segment: str, node: fx.Node, output: int) -> int:
        """Where result `output` of an op, or a placeholder, lies."""
        if is_op(node):
            return self.strategies[(segment, node.name)].outputs[output]
        return self.places.get((segment, node.name), R)

    def read_from(self, segment: str, node: fx.Node, output: int, phase: str) -> int:
        """The same as a reader of this phase finds it: the backward may read what the forward's readers shared."""
        key = f"{node.name}.{output}>forward"
        if phase == "backward" and (segment, f"{node.name}.{output}>kept") in self.places:
            return self.places[(segment, key)]
        return self.of_result(segment, node, output)


def read_choice(graph: ModelGraph, made: Build, choice: list[int], data_axes: Sequence[bool]) -> list[AxisSolution]:
    """From the solver's option numbers to placements on each axis.

    data_axes: on those every gradient of a parameter leaves its segment as a partial sum, which the runtime reduces as
    the ZeRO level asks; one that is already whole is kept by the first rank alone.
    """
    solutions = [AxisSolution() for _ in data_axes]

    def put(segment: str, key: str, places: Places) -> None:
        for solution, place in zip(solutions, places, strict=True):
            solution.places[(segment, key)] = place

    for (owner, node), index in made.op_vars.items():
        for solution, strategy in zip(solutions, made.op_options[index][choice[index]], strict=True):
            solution.strategies[(owner, node)] = strategy
    for (owner, node, output, phase), index in made.copy_vars.items():
        put(owner, f"{node}.{output}>{phase}", made.place_options[index][choice[index]])
    for (owner, node, output), index in made.kept_vars.items():
        kind, places = made.kept_options[index][choice[index]]
        if kind == COPY:
            put(owner, f"{node}.{output}>kept", places)
    for (owner, kind, slot), index in made.slot_vars.items():
        put(owner, slot_key(graph.segments[owner], kind, slot), made.place_options[index][choice[index]])
    for segment in graph.segments.values():
        for solution, data in zip(solutions, data_axes, strict=True):
            _param_gradients(segment, solution, data)
    return solutions


def _param_gradients(segment: Segment, solution: AxisSolution, data: bool) -> None:
    results = flatten_outputs(segment.joint.graph)
    first = len(segment.outputs) + len(segment.mutated_buffers)
    for slot in range(len(segment.param_shapes)):
        node = results[first + slot]
        if isinstance(node, fx.Node):
            param = solution.places[(segment.name, f"param_{slot}")]
            found = solution.of_result(segment.name, *origin(node))
            solution.places[(segment.name, f"param_grad_{slot}")] = P if data or (found == P and param == R) else param


def write_placements(graph: ModelGraph, axes: Sequence[AxisSolution]) -> dict[str, dict[str, list[str]]]:
    """One text per axis for each key, keys in graph order."""
    written: dict[str, dict[str, list[str]]] = {}
    for name, segment in graph.segments.items():
        rows: dict[str, list[str]] = {}
        for node in segment.joint.graph.nodes:
            if is_op(node):
                rows[node.name] = [_strategy_text(axis.strategies[(name, node.name)]) for axis in axes]
            elif node.op == "placeholder" and any((name, node.name) in axis.places for axis in axes):
                rows[node.name] = [to_text(axis.places.get((name, node.name), R)) for axis in axes]
        others = dict.fromkeys(key for axis in axes for owner, key in axis.places if owner == name)
        for key in others:
            if key not in rows:
                rows[key] = [to_text(axis.places.get((name, key), R)) for axis in axes]
        written[name] = rows
    return written


def read_placements(placements: dict[str, dict[str, list[str]]], num_axes: int) -> list[AxisSolution]:
    axes = [AxisSolution() for _ in range(num_axes)]
    for segment, rows in placements.items():
        for key, texts in rows.items():
            for axis, text in zip(axes, texts, strict=True):
                if "->" in text:
                    axis.strategies[(segment, key)] = _read_strategy(text)
                else:
                    axis.places[(segment, key)] = from_text(text)
    return axes


def _strategy_text(strategy: Strategy) -> str:
    text = ",".join(map(to_text, strategy.inputs)) + "->" + ",".join(map(to_text, strategy.outputs))
    return f"{text}@{strategy.lowering}" if strategy.lowering else text


def _read_strategy(text: str) -> Strategy:
    body, _, lowering = text.partition("@")
    left, right = body.split("->")
    parse = lambda side: tuple(from_text(t) for t in side.split(",") if t)  # noqa: E731
    return Strategy(parse(left), parse(right), lowering=lowering)


def whole(graph: ModelGraph) -> AxisSolution:
    """Everything whole: an axis of size one."""
    solution = AxisSolution()
    for name, segment in graph.segments.items():
        for node in segment.joint.graph.nodes:
            if is_op(node):
                solution.strategies[(name, node.name)] = replicated(view_of(node))
    return solution
