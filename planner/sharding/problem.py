"""The sharding problem of a whole model on one mesh axis, over its distinct segments.

Variables (each an option out of a list of placements or strategies):
    op         one per op of each distinct segment's joint graph: which strategy it runs          (_add_ops)
    param      one per distinct parameter slot; slots that ever hold the same parameter are one   (_add_params)
    value      one per class of boundary values: an instance's output and the input slots that
               read it lie the same way, so a segment stored once is rewritten once               (_add_boundaries)
    gradient   the same for gradients of boundary values                                          (_add_boundaries)
    copy       the form in which one result reaches several readers of a phase                    (_add_copies)

Costs, in seconds per microbatch, times the number of instances of the segment:
    op         compute time of the strategy's local share
    edge       producer -> copy -> reader, reader -> boundary: the cheapest collective between the two placements
    gradient of a parameter -> parameter: nothing when equal or when a partial sum stays one (it is summed once a step);
               otherwise the collective between them                                              (_add_param_gradients)

An edge whose producer is a forward op and whose reader is a backward op redistributes in the backward, so that what is
kept from forward to backward is the producer's own shard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from ...profiler.graph import ModelGraph, Segment
from ...profiler.joint import flatten_outputs
from .catalog import fits, strategies
from .pbqp import Problem
from .placement import P, R, can_shard, transition_seconds
from .strategy import OpView, Strategy, is_op, view_of

TIE_BREAK_S_PER_BYTE = 1e-16  # of two equal choices, the one that leaves fewer bytes on a rank


@dataclass(frozen=True)
class Axis:
    """One mesh axis as the solver sees it. Sizes of tensors are local to the axes solved before."""

    name: str
    size: int
    collective_s: Callable[[str, float], float]  # kind, bytes of the whole tensor (on this axis) -> seconds
    memory_s: Callable[[float], float]  # bytes -> seconds of a local copy
    op_s: Callable[[fx.Node, float, float], float]  # node, share of flops, bytes -> seconds
    local_bytes: Callable[[str, fx.Node, int], float]  # segment, node, output index -> bytes before this axis splits it
    allowed: Callable[[str, fx.Node, int, torch.Tensor, int], bool]  # segment, node, output, tensor, dim: may be split
    key_allowed: Callable[[str, str, int], bool]  # segment, key of AxisSolution.places, dim: may be split there
    inner_allowed: Callable[[str, fx.Node, Strategy], bool]  # may this op take this strategy, given the axes before
    input_place: Callable[[str, torch.Size], int]  # user input -> placement
    params_whole: bool  # the data axis: parameters are whole here, ZeRO shards them outside the graph
    param_byte_s: float = TIE_BREAK_S_PER_BYTE  # price of a byte of parameters left on a rank: trades time for memory
    result_byte_s: float = TIE_BREAK_S_PER_BYTE  # the same of an op's result


@dataclass
class Build:
    """The problem and what its variables mean."""

    problem: Problem = field(default_factory=Problem)
    op_vars: dict[tuple[str, str], int] = field(default_factory=dict)  # (segment, node) -> variable
    op_options: dict[int, list[Strategy]] = field(default_factory=dict)
    place_options: dict[int, list[int]] = field(default_factory=dict)  # param, value, gradient and copy variables
    slot_vars: dict[tuple[str, str, int], int] = field(default_factory=dict)  # (segment, in|out|gin|tan|param, slot)
    copy_vars: dict[tuple[str, str, int, str], int] = field(default_factory=dict)  # (segment, node, output, phase)
    unknown: list[tuple[str, fx.Node]] = field(default_factory=list)


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


def build(graph: ModelGraph, axis: Axis, pinned: dict[str, int] | None = None) -> Build:
    """pinned: FQN of a parameter -> placement it must take."""
    made = Build()
    counts: dict[str, int] = defaultdict(int)
    for instance in graph.instances:
        counts[instance.segment] += 1
    _add_boundaries(graph, axis, made)
    _add_params(graph, axis, made, pinned or {})
    for segment in graph.segments.values():
        _SegmentBuilder(graph, segment, axis, made, counts[segment.name]).run()
    return made


# --------------------------------------------------------------------------- shared between segments


def _domain(axis: Axis, tensor_shape: Iterable[int], allowed: Callable[[int], bool], partial: bool) -> list[int]:
    options = [R] + ([P] if partial else [])
    return options + [d for d, s in enumerate(tensor_shape) if s > 1 and can_shard(s, axis.size) and allowed(d)]


def _placeholder(segment: Segment, name: str) -> fx.Node:
    return next(n for n in segment.joint.graph.nodes if n.op == "placeholder" and n.name == name)


def tangent_slots(segment: Segment) -> list[int]:
    """Output slot of each tangent placeholder, in order."""
    return [j for j, out in enumerate(segment.outputs) if out.requires_grad]


def _add_boundaries(graph: ModelGraph, axis: Axis, made: Build) -> None:
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
    fixed: dict[Any, int] = {}
    for name in graph.input_names:
        fixed[values.find(("value", name))] = axis.input_place(name, torch.Size(graph.values[name].shape))
    fixed[values.find(("value", graph.loss))] = R
    fixed[gradients.find(("gradient", graph.loss))] = R
    for union, kinds in ((values, ("in", "out")), (gradients, ("gin", "tan"))):
        classes: dict[Any, int] = {}
        for key in list(union.parent):
            if len(key) != 3 or key[1] not in kinds:
                continue
            root = union.find(key)
            if root not in classes:
                classes[root] = _boundary_variable(graph, axis, made, key, fixed.get(root), kinds[0] == "gin")
            made.slot_vars[key] = classes[root]
            _narrow(graph, axis, made, key, classes[root])


def _boundary_node(graph: ModelGraph, key: tuple[str, str, int]) -> tuple[Segment, fx.Node, torch.Tensor]:
    segment = graph.segments[key[0]]
    if key[1] in ("in", "gin"):
        node = _placeholder(segment, f"input_{key[2]}")
    elif key[1] == "tan":
        node = _placeholder(segment, f"tangent_{tangent_slots(segment).index(key[2])}")
    else:
        node = flatten_outputs(segment.joint.graph)[key[2]]
    return segment, node, node.meta["val"]


def _boundary_variable(
    graph: ModelGraph, axis: Axis, made: Build, key: tuple[str, str, int], fixed: int | None, partial: bool
) -> int:
    _, _, tensor = _boundary_node(graph, key)
    if fixed is not None:
        options = [fixed]
    else:
        options = _domain(axis, tensor.shape, lambda d: True, partial and tensor.is_floating_point())
    index = made.problem.add_variable(np.zeros(len(options)), ("boundary", key))
    made.place_options[index] = options
    return index


def slot_key(segment: Segment, kind: str, slot: int) -> str:
    """Where a slot variable stands in AxisSolution.places."""
    if kind == "tan":
        return f"tangent_{tangent_slots(segment).index(slot)}"
    return {"in": "input_{}", "out": "output_{}", "gin": "input_grad_{}", "param": "param_{}"}[kind].format(slot)


def _narrow(graph: ModelGraph, axis: Axis, made: Build, key: tuple[str, str, int], index: int) -> None:
    """Forbid what the axes solved before do not allow for this slot."""
    segment = graph.segments[key[0]]
    costs = made.problem.costs[index]
    for i, place in enumerate(made.place_options[index]):
        if place >= 0 and len(costs) > 1 and not axis.key_allowed(segment.name, slot_key(segment, *key[1:]), place):
            costs[i] = np.inf


def _add_params(graph: ModelGraph, axis: Axis, made: Build, pinned: dict[str, int]) -> None:
    union = _Union()
    fqns: dict[Any, set[str]] = defaultdict(set)
    for instance in graph.instances:
        for i, fqn in enumerate(instance.params):
            union.join(("param", fqn), (instance.segment, "param", i))
    for instance in graph.instances:
        for fqn in instance.params:
            fqns[union.find(("param", fqn))].add(fqn)
    classes: dict[Any, int] = {}
    for key in list(union.parent):
        if len(key) != 3:
            continue
        root = union.find(key)
        segment = graph.segments[key[0]]
        if root not in classes:
            shape = segment.param_shapes[key[2]]
            wanted = {pinned[f] for f in fqns[root] if f in pinned}
            if axis.params_whole:
                options = [R]
            elif wanted:
                options = sorted(wanted)[:1]
            else:
                options = _domain(axis, shape, lambda d: True, partial=False)
            node = _placeholder(segment, f"param_{key[2]}")
            full = axis.local_bytes(segment.name, node, 0)
            tie = [axis.param_byte_s * (full if p == R else full / axis.size) for p in options]
            classes[root] = made.problem.add_variable(np.array(tie), ("param", key))
            made.place_options[classes[root]] = options
        made.slot_vars[key] = classes[root]


def origin(node: fx.Node) -> tuple[fx.Node, int]:
    """The op behind a getitem, and which of its results it is."""
    if node.op == "call_function" and not is_op(node):
        return node.args[0], int(node.args[1])  # type: ignore[return-value, arg-type]
    return node, 0


# lowering -> number of all-reduces of one value per row of the op's first operand (0 rows: of one number)
_LOWERING_REDUCES = {"nll_rows": (2, False), "nll_cols": (2, False),
                     "log_softmax_cols": (2, True), "softmax_cols": (2, True),
                     "log_softmax_cols_backward": (1, True), "softmax_cols_backward": (1, True)}  # fmt: skip


def _lowering_seconds(axis: Axis, lowering: str, view: OpView) -> float:
    """The collectives inside a lowering (passes/lowerings.py)."""
    if lowering not in _LOWERING_REDUCES:
        return 0.0
    times, per_row = _LOWERING_REDUCES[lowering]
    first = view.inputs[0]
    rows = first.numel() // first.shape[-1] if per_row else 1
    return times * axis.collective_s("all_reduce", float(rows * first.element_size()))


# --------------------------------------------------------------------------- one distinct segment


class _SegmentBuilder:
    def __init__(self, graph: ModelGraph, segment: Segment, axis: Axis, made: Build, count: int) -> None:
        self.graph, self.segment, self.axis, self.made, self.count = graph, segment, axis, made, count
        self.problem = made.problem
        self.whole: dict[str, int] = {}  # variables of placeholders that are whole everywhere

    def run(self) -> None:
        self._add_ops()
        self._add_reads()
        self._add_results()

    # ----- variables

    def _add_ops(self) -> None:
        axis, name = self.axis, self.segment.name
        for node in self.segment.joint.graph.nodes:
            if not is_op(node):
                continue
            view = view_of(node)
            listed, known = strategies(node)
            if not known and (view.inputs or any(o is not None for o in view.outputs)):
                self.made.unknown.append((name, node))
            options = [s for s in listed if self._fits(s, view) and axis.inner_allowed(name, node, s)]
            costs = np.array([self._op_seconds(node, view, s) for s in options])
            index = self.problem.add_variable(costs * self.count, ("op", name, node.name))
            self.made.op_vars[(name, node.name)] = index
            self.made.op_options[index] = options

    def _fits(self, strategy: Strategy, view: OpView) -> bool:
        sources = [origin(n) for n in view.operands]
        tensors = [(tensor, source, output) for tensor, (source, output) in zip(view.inputs, sources, strict=True)] + [
            (tensor, view.node, k) for k, tensor in enumerate(view.outputs)
        ]
        for place, (tensor, source, output) in zip((*strategy.inputs, *strategy.outputs), tensors, strict=True):
            if place >= 0 and tensor is not None:
                if not can_shard(tensor.shape[place], self.axis.size, strategy.even):
                    return False
                if not self.axis.allowed(self.segment.name, source, output, tensor, place):
                    return False
        return True

    def _op_seconds(self, node: fx.Node, view: OpView, strategy: Strategy) -> float:
        axis, name = self.axis, self.segment.name
        split = any(p >= 0 for p in (*strategy.inputs, *strategy.outputs)) or bool(strategy.lowering)
        moved = 0.0
        for place, operand in zip(strategy.inputs, view.operands, strict=True):
            source, output = origin(operand)
            moved += axis.local_bytes(name, source, output) / (axis.size if place >= 0 else 1)
        kept = 0.0
        for k, place in enumerate(strategy.outputs):
            if view.outputs[k] is not None:
                kept += axis.local_bytes(name, node, k) / (axis.size if place >= 0 else 1)
        seconds = axis.op_s(node, 1.0 / axis.size if split else 1.0, moved + kept) + axis.result_byte_s * kept
        return seconds + _lowering_seconds(axis, strategy.lowering, view)

    # ----- edges

    def _places(self, index: int, output: int) -> list[int]:
        """Placement of result `output` under each option of a variable."""
        if index in self.made.op_options:
            return [s.outputs[output] for s in self.made.op_options[index]]
        return self.made.place_options[index]

    def _matrix(self, before: list[int], after: list[int], node: fx.Node, output: int) -> np.ndarray:
        full = self.axis.local_bytes(self.segment.name, node, output)
        table: dict[tuple[int, int], float] = {}
        for a in set(before):
            for b in set(after):
                table[(a, b)] = transition_seconds(
                    a,
                    b,
                    int(full),
                    self.axis.size,
                    self.axis.collective_s,
                    self.axis.memory_s,  # type: ignore[arg-type]
                )
        return np.array([[table[(a, b)] for b in after] for a in before])

    def _variable_of(self, node: fx.Node) -> int:
        """The variable that decides where a tensor lies: its op's, or its placeholder's."""
        name = self.segment.name
        if is_op(node):
            return self.made.op_vars[(name, node.name)]
        kind, _, slot = node.name.rpartition("_")
        if kind == "param":
            return self.made.slot_vars[(name, "param", int(slot))]
        if kind == "input":
            return self.made.slot_vars[(name, "in", int(slot))]
        if kind == "tangent":
            return self.made.slot_vars[(name, "tan", tangent_slots(self.segment)[int(slot)])]
        if node.name not in self.whole:  # buffers and the random key
            index = self.problem.add_variable(np.zeros(1), ("whole", name, node.name))
            self.made.place_options[index] = [R]
            self.whole[node.name] = index
        return self.whole[node.name]

    def _add_reads(self) -> None:
        readers: dict[tuple[fx.Node, int, str], list[tuple[fx.Node, int]]] = defaultdict(list)
        for node in self.segment.joint.graph.nodes:
            if is_op(node):
                for position, operand in enumerate(view_of(node).operands):
                    source, output = origin(operand)
                    readers[(source, output, node.meta.get("phase", "forward"))].append((node, position))
        for (source, output, phase), group in readers.items():
            producer = self._variable_of(source)
            if len({id(n) for n, _ in group}) > 1:
                producer, output_at = self._add_copy(source, output, phase, producer), 0
            else:
                output_at = output
            for node, position in group:
                reader = self.made.op_vars[(self.segment.name, node.name)]
                wanted = [s.inputs[position] for s in self.made.op_options[reader]]
                matrix = self._matrix(self._places(producer, output_at), wanted, source, output)
                self.problem.add_edge(producer, reader, matrix * self.count)

    def _add_copy(self, source: fx.Node, output: int, phase: str, producer: int) -> int:
        tensor = source.meta["val"]
        tensor = tensor[output] if isinstance(tensor, (tuple, list)) else tensor
        if not isinstance(tensor, torch.Tensor):
            return producer
        name, key = self.segment.name, f"{source.name}.{output}>{phase}"
        allowed = lambda d: self.axis.allowed(name, source, output, tensor, d) and self.axis.key_allowed(name, key, d)  # noqa: E731
        options = _domain(self.axis, tensor.shape, allowed, partial=tensor.is_floating_point())
        index = self.problem.add_variable(
            np.zeros(len(options)), ("copy", self.segment.name, source.name, output, phase)
        )
        self.made.place_options[index] = options
        self.made.copy_vars[(self.segment.name, source.name, output, phase)] = index
        matrix = self._matrix(self._places(producer, output), options, source, output)
        self.problem.add_edge(producer, index, matrix * self.count)
        return index

    def _add_results(self) -> None:
        """Outputs to their boundary, new buffer values whole, gradients to parameters and boundaries."""
        segment, name = self.segment, self.segment.name
        results = flatten_outputs(segment.joint.graph)
        num_outputs, num_updates, num_params = (
            len(segment.outputs),
            len(segment.mutated_buffers),
            len(segment.param_shapes),
        )
        for k, node in enumerate(results):
            if not isinstance(node, fx.Node):
                continue
            source, output = origin(node)
            producer = self._variable_of(source)
            if k < num_outputs:
                self._join(producer, output, source, self.made.slot_vars[(name, "out", k)])
            elif k < num_outputs + num_updates:
                index = self.problem.add_variable(np.zeros(1), ("whole", name, f"update_{k}"))
                self.made.place_options[index] = [R]
                self._join(producer, output, source, index)
            elif k < num_outputs + num_updates + num_params:
                slot = k - num_outputs - num_updates
                self._add_param_gradient(producer, output, source, self.made.slot_vars[(name, "param", slot)])
            else:
                slot = k - num_outputs - num_updates - num_params
                if (name, "gin", slot) in self.made.slot_vars:
                    self._join(producer, output, source, self.made.slot_vars[(name, "gin", slot)])

    def _join(self, producer: int, output: int, source: fx.Node, boundary: int) -> None:
        before, after = self._places(producer, output), self.made.place_options[boundary]
        if producer != boundary:
            self.problem.add_edge(producer, boundary, self._matrix(before, after, source, output) * self.count)

    def _add_param_gradient(self, producer: int, output: int, source: fx.Node, param: int) -> None:
        before, after = self._places(producer, output), self.made.place_options[param]
        matrix = self._matrix(before, after, source, output)
        for i, place in enumerate(before):
            for j, target in enumerate(after):
                if place == P and target == R:
                    matrix[i, j] = 0.0  # summed once a step, by the runtime
        if producer != param:
            self.problem.add_edge(producer, param, matrix * self.count)


__all__ = ["Axis", "Build", "build", "fits", "origin", "tangent_slots"]
