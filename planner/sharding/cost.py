"""What one distinct segment costs on one rank under given placements: seconds of compute and of collectives, bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ...costmodel.segment import SegmentCost
from ...ops.placement import P, Places, R, shares, transition, way
from ...ops.strategy import Strategy
from ...plans.placements import AxisSolution
from ...profiler.graph import Segment
from ...profiler.joint import flatten_outputs, is_getitem
from ...profiler.op_view import is_op, origin, storage_root, view_of
from ...profiler.signature import results, split_backward
from ...profiler.work import is_view, op_work
from .mesh import Mesh


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

    for node in placed.segment.joint.graph.nodes:
        if not is_op(node):
            continue
        phase = node.meta.get("phase", "forward")
        strategies = placed.strategies(node)
        for position, operand in enumerate(view_of(node).operands):
            source, output = origin(operand)
            base = placed.read_from(source, output, phase)
            shared = placed.shared(source, output, phase)
            if shared is not None:
                add(source, output, base, shared, phase)
                base = shared
            add(source, output, base, tuple(s.inputs[position] for s in strategies), phase)
    for key, (source, output), phase in results(placed.segment):
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
            full = num_bytes / shares(tuple(current), mesh.counts)
            found.append(Move(mesh.axes[k].name, kind, full, phase, source.name))  # type: ignore[arg-type]
        current[k] = target
    return found


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


def evaluate(placed: Placed) -> SegmentCost:
    segment, mesh = placed.segment, placed.mesh
    for_input, for_weight = split_backward(segment)
    seconds: dict[str, float] = defaultdict(float)
    flops = 0.0
    scratch: dict[fx.Node, float] = {}
    lasting = 0.0  # what an op leaves for the next of its kind: one at a time
    for node in segment.joint.graph.nodes:
        if not is_op(node):
            continue
        part = "I" if node in for_input else "W" if node in for_weight else "F"
        share, moved = op_load(placed, node)
        seconds[part] += mesh.op_s(node, share, moved)
        flops += matrix_flops(node) * share
        scratch[node], left = mesh.scratch_of(node, share, lambda operand: placed.local_bytes(*origin(operand)))
        lasting = max(lasting, left)
    by_axis = {axis.name: axis for axis in mesh.axes}
    comm: dict[str, float] = defaultdict(float)
    for move in moves(placed):
        comm[move.phase] += by_axis[move.axis].collective_s(move.kind, move.full_bytes)

    def local(node: fx.Node, output: int = 0) -> float:
        return placed.local_bytes(node, output)

    placeholders = {n.name: n for n in segment.joint.graph.nodes if n.op == "placeholder"}
    params = [placeholders[f"param_{i}"] for i in range(len(segment.param_shapes))]
    elements = [local(n) / n.meta["val"].element_size() for n in params]
    trained = [e if t else 0.0 for e, t in zip(elements, segment.param_requires_grad, strict=True)]
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
        trainable_elements=int(sum(trained)),
        buffer_bytes=int(sum(local(n) for name, n in placeholders.items() if name.startswith("buffer_"))),
        saved_bytes=int(sum(placed.local_bytes(*s, placed.kept(*s)) for s in saved)),
        recompute_saved_bytes=int(sum(local(n) for n in inputs if n.meta["val"].is_floating_point())),
        input_bytes=int(sum(local(n) for n in inputs)),
        output_bytes=int(sum(local(*o) for o in outputs)),
        workspace_bytes=int(_workspace(segment, local, {s for s in saved}, scratch) + lasting),
        model_flops=flops,
        summed_elements=int(sum(e for i, e in enumerate(trained) if is_summed(placed, i))),
    )


def is_summed(placed: Placed, slot: int) -> bool:
    """Does the gradient of a parameter leave the segment as a partial sum over an axis other than data?"""
    places = placed.at(f"param_grad_{slot}")
    wide = [axis.size > 1 and not axis.data for axis in placed.mesh.axes]
    return places is not None and any(p == P and w for p, w in zip(places, wide, strict=True))


def op_load(placed: Placed, node: fx.Node) -> tuple[float, float]:
    """(share of the captured op's flops, bytes read and written) on one rank."""
    view, mesh, strategies = view_of(node), placed.mesh, placed.strategies(node)
    moved, batched = 0.0, False
    for k, operand in enumerate(view.operands):
        sizes = mesh.sizes(*origin(operand))
        batched = batched or any(sizes.batched)
        moved += sizes.num_bytes / shares(tuple(s.inputs[k] for s in strategies), mesh.counts)
    for k in range(len(view.outputs)):
        sizes = mesh.sizes(node, k)
        batched = batched or any(sizes.batched)
        moved += sizes.num_bytes / shares(tuple(s.outputs[k] for s in strategies), mesh.counts)
    return mesh.share(strategies, batched), moved


def matrix_flops(node: fx.Node) -> float:
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
    segment: Segment,
    local_bytes: Callable[[fx.Node, int], float],
    saved: set[tuple[fx.Node, int]],
    scratch: Mapping[fx.Node, float],
) -> float:
    """Most bytes alive at once inside one backward (or forward), beyond what is saved, by last use.

    scratch: what an op holds while it runs.
    """
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
        peak = max(peak, alive + scratch.get(node, 0.0))
        for key in dying[position]:
            if key in held:
                held.discard(key)
                alive -= local_bytes(*key)
    return peak
