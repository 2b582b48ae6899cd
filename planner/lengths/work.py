"""What a sequence of some length takes on a group of ranks, from a model captured at one length.

All ops but attention take time in proportion to tokens, and so do collectives; attention to pairs of tokens. So one
capture says both: of the seconds of a captured sequence on a context axis of some width, what attention takes grows
with the square of the length, the rest with the length, and so does what a token keeps on its rank. What a ring sends
hides beside attention, so that short sequences show more of it than the captured one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...costmodel.attention import AttentionCall
from ...costmodel.memory import memory_error, reserve_bytes, slack_factor
from ...costmodel.segment import RecomputePoint, SegmentCost
from ...plans.axes import MeshShape, free_axis, sequence_axes
from ...profiler.graph import ModelGraph
from ..sharding.mesh import RINGS
from ..sharding.sharder import Sharder
from .assignment import GroupWork

ALL, NONE = "all", "none"
GROUPS = 4  # communicators that a rank belongs to


@dataclass(frozen=True)
class Policy:
    """recompute: "all" of each layer, or "none". zero: its stage, over all ranks."""

    recompute: str
    zero: int


def widths_of(num_ranks: int) -> list[int]:
    """Powers of two that divide the ranks."""
    return [1 << k for k in range(num_ranks.bit_length()) if num_ranks % (1 << k) == 0]


def mesh_of(width: int, num_ranks: int) -> MeshShape:
    return MeshShape.of({sequence_axes()[0]: width, free_axis(): num_ranks // width})


def group_works(
    sharder: Sharder, graph: ModelGraph, num_tokens: int, num_ranks: int, policy: Policy, free_bytes: float
) -> list[GroupWork]:
    """num_tokens: of a captured sequence. free_bytes: of each rank, for what a pack of sequences keeps and holds."""
    again = policy.recompute == ALL
    widths = [width for width in widths_of(num_ranks) if num_tokens % width == 0]
    held = [_bytes(sharder, mesh_of(width, num_ranks), again) for width in widths]
    fixed = 0.0
    if len(widths) > 1:  # what does not halve with the tokens of a rank, where there are few
        fixed = max(0.0, 2.0 * held[-1] - held[-2])
    found = []
    for width, num_bytes in zip(widths, held, strict=True):
        of_a_token = max(num_bytes - fixed, 0.0) * width / num_tokens
        most = int(max(0.0, free_bytes - fixed) / max(of_a_token, 1e-9)) * width
        found.append(_group_work(sharder, graph, num_tokens, mesh_of(width, num_ranks), again, most))
    return found


def _bytes(sharder: Sharder, mesh: MeshShape, again: bool) -> float:
    """Kept and held by a rank for one captured sequence."""
    costs = sharder.solve(mesh, 1).costs
    kept = sum(sharder.counts[name] * _kept_bytes(cost, again) for name, cost in costs.items())
    return float(kept + max((_held_bytes(cost, again) for cost in costs.values()), default=0))


def _group_work(
    sharder: Sharder, graph: ModelGraph, num_tokens: int, mesh: MeshShape, again: bool, most_tokens: int
) -> GroupWork:
    solved, width = sharder.solve(mesh, 1), mesh.sequence_ranks
    total_s = sum(sharder.counts[name] * _seconds(cost, again) for name, cost in solved.costs.items())
    pairs_s = min(total_s, _attention_s(sharder, graph, width, again))
    ring_s = _ring_s(sharder, graph, mesh, again) if _has_rings(solved.placements) else 0.0
    shown_s = max(0.0, ring_s - (1.0 - 1.0 / width) * pairs_s)
    return GroupWork(
        width=width,
        linear_s=max(0.0, total_s - pairs_s - shown_s) / num_tokens,
        quadratic_s=pairs_s / num_tokens**2,
        most_tokens=most_tokens,
        ring_s=ring_s / num_tokens,
    )


def _whole(cost: SegmentCost) -> RecomputePoint | None:
    return next((point for point in cost.recompute_points if point.is_whole), None)


def _seconds(cost: SegmentCost, again: bool) -> float:
    found = cost.forward_s + cost.backward_s + cost.forward_comm_s + cost.backward_comm_s
    point = _whole(cost) if again else None
    return found + (point.seconds if point is not None else 0.0)


def _kept_bytes(cost: SegmentCost, again: bool) -> int:
    point = _whole(cost) if again else None
    return cost.saved_bytes if point is None else point.saved_bytes


def _held_bytes(cost: SegmentCost, again: bool) -> int:
    held = cost.held_at(_whole(cost) if again else None)
    return max(held.forward, held.backward_made, 0)


def _attention_s(sharder: Sharder, graph: ModelGraph, width: int, again: bool) -> float:
    """Of one captured sequence on one rank of a group. A balanced ring, or heads, give each rank an equal share."""
    share = 1.0 / (max(graph.batch_size, 1) * width)
    found = 0.0
    for name, segment in graph.segments.items():
        for node in segment.joint.graph.nodes:
            call = AttentionCall.read(node) if node.op == "call_function" else None
            if call is not None:
                times = 2 if again and not call.is_backward else 1
                found += times * sharder.counts[name] * sharder.op_seconds(node, share, 0.0)
    return found


def _has_rings(placements: Mapping[str, Mapping[str, Sequence[str]]]) -> bool:
    return any(
        text.partition("@")[2].startswith(RINGS)
        for rows in placements.values()
        for row in rows.values()
        for text in row
    )


def _ring_s(sharder: Sharder, graph: ModelGraph, shape: MeshShape, again: bool) -> float:
    """Of keys and values of one captured sequence on their way round, in the backward with their gradients."""
    axis = next(axis for axis in sharder.mesh(shape, 1).axes if axis.role.carries_sequence)
    found = 0.0
    for name, segment in graph.segments.items():
        for node in segment.joint.graph.nodes:
            call = AttentionCall.read(node) if node.op == "call_function" else None
            if call is not None:
                sizes = math.prod(call.key) + math.prod(call.value)
                num_bytes = sizes * call.dtypes[1].itemsize / max(graph.batch_size, 1)
                times = 2 if call.is_backward or again else 1
                found += times * sharder.counts[name] * axis.collective_s("all_gather", num_bytes)
    return found


def state_bytes(sharder: Sharder, graph: ModelGraph, zero: int, num_ranks: int) -> float:
    """Of parameters, gradients and optimizer state on a rank, with one segment's parameters gathered under ZeRO 3."""
    kinds = sharder.job.kinds
    sizes = {name: sum(math.prod(shape) for shape in graph.segments[name].param_shapes) for name in graph.segments}
    elements = sum(math.prod(graph.params[name][0]) for name in graph.params)
    most = max(sizes.values(), default=0)

    def left(from_stage: int) -> float:
        return 1.0 / num_ranks if zero >= from_stage else 1.0

    found = elements * (kinds.compute * left(3) + kinds.reduce * left(2) + kinds.of_master * left(1))
    return found + (2 * most * kinds.compute if zero == 3 else 0.0)


def free_bytes(sharder: Sharder, graph: ModelGraph, zero: int, num_ranks: int) -> float:
    """What state and the margin for errors of the memory model leave of a rank's device."""
    device = sharder.cost_model.cluster.worst_device()
    limit = (device.memory_bytes - reserve_bytes(device.kind, GROUPS)) / slack_factor(device.kind)
    if sharder.cost_model.cluster.memory_limit_bytes is None:  # a limit of the user's is taken as it is said
        limit /= 1.0 + memory_error(device.kind, sharder.cost_model.stack)
    return limit - state_bytes(sharder, graph, zero, num_ranks)
