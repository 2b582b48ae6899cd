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

from ..ops.placement import R, from_text, to_text
from ..ops.strategy import Strategy, replicated
from ..profiler.graph import ModelGraph
from ..profiler.op_view import is_op, view_of


def kept_key(node: str, output: int) -> str:
    """Of the form in which the forward keeps a result for the backward, where that is not the producer's own."""
    return f"{node}.{output}>kept"


def is_kept_key(key: str) -> bool:
    return key.endswith(">kept")


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
        if phase == "backward" and (segment, kept_key(node.name, output)) in self.places:
            return self.places[(segment, key)]
        return self.of_result(segment, node, output)


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
