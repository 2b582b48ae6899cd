"""What one distinct segment costs on one rank under given placements: seconds of compute and of collectives, bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from ...costmodel.segment import RecomputePoint, SegmentCost
from ...ops.placement import P, R
from ...profiler.op_view import origin
from ...profiler.slots import BUFFER, INPUT, PARAM, PARAM_GRAD, kind_of, slot_name, slot_names
from .expert_sends import chunks_bytes, experts_moved
from .mesh import RINGS
from .recompute import Recomputation, hull
from .routes import Placed, Route, routes
from .working import Working


def evaluate(placed: Placed) -> SegmentCost:
    segment, mesh, facts = placed.segment, placed.mesh, placed.facts
    seconds: dict[str, float] = defaultdict(float)
    flops = 0.0
    of_chunks = chunks_bytes(placed)
    scratch: dict[fx.Node, float] = {}
    lasting = 0.0  # what an op leaves for the next of its kind: one at a time
    op_s: dict[fx.Node, float] = {}
    for node in facts.parts:
        share, moved = op_load(placed, node)
        op_s[node] = mesh.op_s(node, share, moved)
        flops += facts.model_flops.get(node, 0.0) * share
        scratch[node], left = mesh.scratch_of(node, share, lambda operand: placed.local_bytes(*origin(operand)))
        scratch[node] += of_chunks.get(node, 0.0)
        lasting = max(lasting, left)
    op_s = _as_dispatched(op_s, facts.parts, mesh.dispatch_s) if mesh.dispatch_s else op_s
    for node, part in facts.parts.items():
        seconds[part] += op_s[node]
    by_axis = {axis.name: axis for axis in mesh.axes}
    rings_s = {phase: _rings_s(placed, phase, op_s) for phase in ("forward", "backward")}

    def collective_s(route: Route) -> float:
        return sum(by_axis[move.axis].collective_s(move.kind, move.full_bytes) for move in route.moves)

    asked = routes(placed)
    comm: dict[str, float] = defaultdict(float, rings_s)
    moved_s, sent = experts_moved(placed, op_s)
    for node, dispatched_s in moved_s.items():
        comm[node.meta.get("phase", "forward")] += dispatched_s
    for route in asked:
        comm[route.phase] += collective_s(route)

    def local(node: fx.Node, output: int = 0) -> float:
        return placed.local_bytes(node, output)

    placeholders = facts.placeholders
    params = [placeholders[name] for name in slot_names(PARAM, len(segment.param_shapes))]
    elements = [local(n) / n.meta["val"].element_size() for n in params]
    trained = [e if t else 0.0 for e, t in zip(elements, segment.param_requires_grad, strict=True)]
    inputs = [placeholders[name] for name in slot_names(INPUT, len(segment.inputs))]
    saved_bytes = int(
        sum(placed.local_bytes(*s, placed.kept(*s)) for s in facts.saved) + sum(each.num_bytes for each in sent)
    )
    working = Working(placed, scratch, lasting)
    held = working.of(frozenset(facts.saved))
    return SegmentCost(
        forward_s=seconds["F"],
        backward_input_s=seconds["I"],
        backward_weight_s=seconds["W"],
        forward_comm_s=comm["forward"],
        backward_comm_s=comm["backward"],
        param_elements=int(sum(elements)),
        param_bytes=int(sum(map(local, params))),
        trainable_elements=int(sum(trained)),
        buffer_bytes=int(sum(local(n) for name, n in placeholders.items() if kind_of(name) == BUFFER)),
        saved_bytes=saved_bytes,
        input_bytes=int(sum(local(n) for n in inputs)),
        output_bytes=int(sum(local(*o) for o in facts.outputs)),
        workspace_bytes=held.backward,
        model_flops=flops,
        recompute_points=_points(
            placed, Recomputation(placed, op_s, asked, collective_s, (moved_s, sent)), saved_bytes, working
        ),
        expert_elements=int(sum(e for i, e in enumerate(trained) if is_of_experts(placed, i))),
        summed_elements=int(sum(e for i, e in enumerate(trained) if is_summed(placed, i))),
        workspace=held,
    )


def _as_dispatched(
    op_s: Mapping[fx.Node, float], parts: Mapping[fx.Node, str], dispatch_s: float
) -> dict[fx.Node, float]:
    """A forward or backward of a segment takes no less than the host needs to start its ops: all of them then take
    longer alike."""
    found = dict(op_s)
    for pieces in (("F",), ("I", "W")):
        mine = [node for node, part in parts.items() if part in pieces and op_s[node] > 0]
        on_device_s = sum(op_s[node] for node in mine)
        if mine and len(mine) * dispatch_s > on_device_s:
            found |= {node: op_s[node] * len(mine) * dispatch_s / on_device_s for node in mine}
    return found


def _rings_s(placed: Placed, phase: str, op_s: Mapping[fx.Node, float]) -> float:
    """Of what ring attention sends inside its own programs and does not hide."""
    mesh, seconds = placed.mesh, 0.0
    for node, view in placed.facts.views.items():
        strategies = placed.strategies(node) if node.meta.get("phase", "forward") == phase else ()
        if any(s.lowering.startswith(RINGS) for s in strategies):
            operands = [mesh.sizes(*origin(n)) for n in view.operands]
            results = [mesh.sizes(node, k) for k in range(len(view.outputs))]
            seconds += mesh.ring_s(strategies, operands, results, op_s.get(node, 0.0))
    return seconds


def _points(placed: Placed, again: Recomputation, saved_bytes: int, working: Working) -> tuple[RecomputePoint, ...]:
    """The choices are those of the first placements seen on a mesh of these sizes and with these units, each priced
    under these."""
    key = placed.mesh.counts, frozenset(again.units)
    if key not in placed.facts.recompute_choices:
        placed.facts.recompute_choices[key] = again.values.choices()
    whole = again.point(frozenset(), is_whole=True)
    points = list(hull([*map(again.point, placed.facts.recompute_choices[key]), whole]))
    if whole not in points:
        points.append(whole)
    return tuple(
        replace(
            point,
            saved_bytes=max(0, saved_bytes + point.saved_bytes),
            workspace=working.of(again.kept(again.units if point.is_whole else point.recomputed)),
        )
        for point in points
    )


def is_of_experts(placed: Placed, slot: int) -> bool:
    """Does an axis of experts cut the parameter?"""
    axes = placed.mesh.axes
    places = placed.at(slot_name(PARAM, slot)) or (R,) * len(axes)
    return any(p >= 0 and axis.size > 1 and axis.role.cuts_experts for p, axis in zip(places, axes, strict=True))


def is_summed(placed: Placed, slot: int) -> bool:
    """Does the gradient of a parameter leave the segment as a partial sum over an axis on which not all do?"""
    return any(partial_axes(placed, slot))


def partial_axes(placed: Placed, slot: int) -> tuple[bool, ...]:
    """Those axes, among all of the mesh."""
    axes = placed.mesh.axes
    places = placed.at(slot_name(PARAM_GRAD, slot)) or (R,) * len(axes)
    return tuple(p == P and axis.size > 1 and not axis.role.grads_partial for p, axis in zip(places, axes, strict=True))


def op_load(placed: Placed, node: fx.Node) -> tuple[float, float]:
    """(share of the captured op's flops, bytes read and written) on one rank."""
    view, mesh, strategies = placed.facts.views[node], placed.mesh, placed.strategies(node)
    moved, batched = 0.0, False
    for k, operand in enumerate(view.operands):
        sizes = mesh.sizes(*origin(operand))
        batched = batched or any(sizes.batched)
        moved += sizes.num_bytes / mesh.shares(tuple(s.inputs[k] for s in strategies))
    results = [mesh.sizes(node, k) for k in range(len(view.outputs))]
    batched = batched or any(any(sizes.batched) for sizes in results)
    moved += mesh.moved_bytes(node, strategies, results)
    return mesh.share(strategies, batched), moved
