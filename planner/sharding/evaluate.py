"""What one distinct segment costs on one rank under given placements: seconds of compute and of collectives, bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from ...costmodel.segment import SegmentCost
from ...profiler.graph import Segment
from ...profiler.joint import flatten_outputs, is_getitem
from ...profiler.work import is_view, op_work
from .placement import R, transition
from .problem import origin
from .solution import AxisSolution
from .strategy import is_op, view_of


@dataclass(frozen=True)
class Move:
    """A redistribution that the solution asks for on one axis. full_bytes: of the tensor whole on that axis."""

    axis: str
    kind: str
    full_bytes: float
    phase: str
    node: str


@dataclass(frozen=True)
class AxisView:
    name: str
    size: int
    solution: AxisSolution
    collective_s: Callable[[str, float], float]


def moves(segment: Segment, axes: list[AxisView], bytes_before: Callable[[fx.Node, int, int], float]) -> list[Move]:
    """Every collective that the solution needs in the segment.

    bytes_before(node, output, axis number): tensor bytes with the other axes' sharding applied and this axis whole.
    """
    found: list[Move] = []
    for number, axis in enumerate(axes):
        if axis.size == 1:
            continue
        found += _axis_moves(segment, number, axis, bytes_before)
    return found


def _axis_moves(
    segment: Segment, number: int, axis: AxisView, bytes_before: Callable[[fx.Node, int, int], float]
) -> list[Move]:
    name, solution = segment.name, axis.solution
    found: dict[tuple[str, int, int, str], Move] = {}

    def add(source: fx.Node, output: int, before: int, after: int, phase: str) -> None:
        kind = transition(before, after)
        if kind in ("", "local", None):
            return
        move = Move(axis.name, kind, bytes_before(source, output, number), phase, source.name)  # type: ignore[arg-type]
        found[(f"{source.name}.{output}:{before}", after, 0, phase)] = move

    for node in segment.joint.graph.nodes:
        if not is_op(node):
            continue
        phase = node.meta.get("phase", "forward")
        for position, operand in enumerate(view_of(node).operands):
            source, output = origin(operand)
            wanted = solution.strategies[(name, node.name)].inputs[position]
            made = solution.of_result(name, source, output)
            copy = solution.places.get((name, f"{source.name}.{output}>{phase}"))
            if copy is not None:
                add(source, output, made, copy, phase)
                made = copy
            add(source, output, made, wanted, phase)
    for key, (source, output), phase in results(segment):
        target = solution.places.get((name, key))
        if target is not None:
            add(source, output, solution.of_result(name, source, output), target, phase)
        elif key.startswith("update_"):
            add(source, output, solution.of_result(name, source, output), R, phase)
    return list(found.values())


def results(segment: Segment) -> list[tuple[str, tuple[fx.Node, int], str]]:
    """(key in the plan, producing op and result, phase) of everything that the joint graph returns."""
    found = []
    nodes = flatten_outputs(segment.joint.graph)
    num_outputs, num_updates, num_params = len(segment.outputs), len(segment.mutated_buffers), len(segment.param_shapes)
    for k, node in enumerate(nodes):
        if not isinstance(node, fx.Node):
            continue
        if k < num_outputs:
            key, phase = f"output_{k}", "forward"
        elif k < num_outputs + num_updates:
            key, phase = f"update_{k - num_outputs}", "forward"
        elif k < num_outputs + num_updates + num_params:
            key, phase = f"param_grad_{k - num_outputs - num_updates}", "backward"
        else:
            key, phase = f"input_grad_{k - num_outputs - num_updates - num_params}", "backward"
        found.append((key, origin(node), phase))
    return found


def storage_root(node: fx.Node) -> tuple[fx.Node, int]:
    """The op that owns the memory of a result: views belong to what they view."""
    source, output = origin(node)
    while is_op(source) and is_view(source) and isinstance(source.args[0], fx.Node):
        source, output = origin(source.args[0])
    return source, output


def saved_tensors(segment: Segment) -> list[tuple[fx.Node, int]]:
    """Results of the forward (and inputs) that the backward reads, each memory once; no parameters and buffers."""
    found: dict[tuple[fx.Node, int], None] = {}
    for node in segment.joint.graph.nodes:
        if node.meta.get("phase") != "backward" or node.op != "call_function" or is_getitem(node):
            continue
        for operand in node.all_input_nodes:
            if operand.meta.get("phase") == "backward" or not isinstance(operand.meta.get("val"), torch.Tensor):
                continue
            source, output = storage_root(operand)
            if source.op != "placeholder" or source.name.startswith("input_"):
                found[(source, output)] = None
    return list(found)


def split_backward(segment: Segment) -> tuple[set[fx.Node], set[fx.Node]]:
    """Backward nodes that input gradients need, and those that only weight gradients need (Zero Bubble, section 2)."""
    wanted: set[fx.Node] = set()
    stack = [source for key, (source, _), _ in results(segment) if key.startswith("input_grad")]
    while stack:
        node = stack.pop()
        if node in wanted or node.meta.get("phase") != "backward":
            continue
        wanted.add(node)
        stack.extend(node.all_input_nodes)
    backward = {n for n in segment.joint.graph.nodes if n.meta.get("phase") == "backward" and is_op(n)}
    return backward & wanted, backward - wanted


def evaluate(
    segment: Segment,
    axes: list[AxisView],
    bytes_before: Callable[[fx.Node, int, int], float],
    local_bytes: Callable[[fx.Node, int], float],
    op_seconds: Callable[[fx.Node, float, float], float],
    op_share: Callable[[fx.Node], float],
) -> tuple[SegmentCost, list[Move]]:
    """local_bytes: of a result on one rank, all axes applied. op_share: the rank's share of an op's captured flops."""
    for_input, for_weight = split_backward(segment)
    seconds: dict[str, float] = defaultdict(float)
    flops = 0.0
    for node in segment.joint.graph.nodes:
        if not is_op(node):
            continue
        part = "I" if node in for_input else "W" if node in for_weight else "F"
        moved = sum(local_bytes(*origin(n)) for n in view_of(node).operands)
        moved += sum(local_bytes(node, k) for k, o in enumerate(view_of(node).outputs) if o is not None)
        share = op_share(node)
        seconds[part] += op_seconds(node, share, moved)
        flops += _matrix_flops(node) * share
    listed = moves(segment, axes, bytes_before)
    by_axis = {axis.name: axis for axis in axes}
    comm: dict[str, float] = defaultdict(float)
    for move in listed:
        comm[move.phase] += by_axis[move.axis].collective_s(move.kind, move.full_bytes)
    placeholders = {n.name: n for n in segment.joint.graph.nodes if n.op == "placeholder"}
    params = [placeholders[f"param_{i}"] for i in range(len(segment.param_shapes))]
    elements = [local_bytes(n, 0) / n.meta["val"].element_size() for n in params]
    buffers = [n for name, n in placeholders.items() if name.startswith("buffer_")]
    inputs = [placeholders[f"input_{i}"] for i in range(len(segment.inputs))]
    saved = saved_tensors(segment)
    outputs = [origin(n) for n in flatten_outputs(segment.joint.graph)[: len(segment.outputs)]]
    return SegmentCost(
        forward_s=seconds["F"],
        backward_input_s=seconds["I"],
        backward_weight_s=seconds["W"],
        forward_comm_s=comm["forward"],
        backward_comm_s=comm["backward"],
        param_elements=int(sum(elements)),
        trainable_elements=int(sum(e for e, t in zip(elements, segment.param_requires_grad, strict=True) if t)),
        buffer_bytes=int(sum(local_bytes(n, 0) for n in buffers)),
        saved_bytes=int(sum(local_bytes(*s) for s in saved)),
        recompute_saved_bytes=int(sum(local_bytes(n, 0) for n in inputs if n.meta["val"].is_floating_point())),
        input_bytes=int(sum(local_bytes(n, 0) for n in inputs)),
        output_bytes=int(sum(local_bytes(*o) for o in outputs)),
        workspace_bytes=int(_workspace(segment, local_bytes, {s for s in saved})),
        model_flops=flops,
    ), listed


def _matrix_flops(node: fx.Node) -> float:
    """What counts as model FLOPs: matrix products, convolutions and attention."""
    name = str(getattr(node.target, "overloadpacket", ""))
    if name.split(".")[-1] in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_grouped_mm"):
        return op_work(node).flops
    if name.startswith("shardwright.expert_mlp"):
        return op_work(node).flops
    if name.startswith("shardwright.attention"):
        # the backward recomputes the scores; the model's own count is four products of the backward's five
        return op_work(node).flops * (0.8 if name.endswith("backward") else 1.0)
    return 0.0


def _workspace(
    segment: Segment, local_bytes: Callable[[fx.Node, int], float], saved: set[tuple[fx.Node, int]]
) -> float:
    """Most bytes alive at once inside one backward (or forward), beyond what is saved, by last use."""
    nodes = [n for n in segment.joint.graph.nodes if n.op == "call_function"]
    last: dict[tuple[fx.Node, int], int] = {}
    for position, node in enumerate(nodes):
        for operand in node.all_input_nodes:
            last[storage_root(operand)] = position
    for node in flatten_outputs(segment.joint.graph):
        if isinstance(node, fx.Node):
            last[storage_root(node)] = len(nodes)
    dying: dict[int, list[tuple[fx.Node, int]]] = defaultdict(list)
    for key, position in last.items():
        dying[position].append(key)
    alive = peak = 0.0
    held: set[tuple[fx.Node, int]] = set()
    for position, node in enumerate(nodes):
        if is_op(node) and not is_view(node):
            for k, out in enumerate(view_of(node).outputs):
                if out is not None and (node, k) not in saved and (node, k) in last:
                    held.add((node, k))
                    alive += local_bytes(node, k)
        peak = max(peak, alive)
        for key in dying[position]:
            if key in held:
                held.discard(key)
                alive -= local_bytes(*key)
    return peak


__all__ = ["AxisView", "Move", "evaluate", "moves", "results", "saved_tensors", "split_backward", "storage_root"]
