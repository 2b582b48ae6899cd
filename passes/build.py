"""From a captured model and a plan to the programs that this rank runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ..errors import ExitCode, ShardwrightError
from ..planner.plan import Plan
from ..planner.sharding.placement import P, R
from ..planner.sharding.solution import AxisSolution, read_placements
from ..planner.sharding.strategy import is_op
from ..profiler.graph import ModelGraph, Segment
from .partition import partition
from .program import SegmentProgram
from .redistribute import MeshAxis
from .shard import ShardContext, local_shape, shard_segment


def build_segment_programs(
    graph: ModelGraph,
    plan: Plan,
    axes: Mapping[str, MeshAxis],
    device: torch.device,
    only: Collection[str] | None = None,
) -> dict[str, SegmentProgram]:
    """axes: this rank's view of each mesh axis inside a stage. only: the distinct segments that this rank runs."""
    check_fits(graph, plan)
    solutions = read_placements(plan.placements, len(plan.placement_axes))
    whole = MeshAxis("", 1, 0, "")
    context = ShardContext(tuple(axes.get(name, whole) for name in plan.placement_axes), tuple(solutions), device)
    names = graph.segments if only is None else only
    return {
        name: build_segment_program(
            graph.segments[name], context, recompute=plan.memory_policy.recompute.get(name, "none") == "all"
        )
        for name in names
    }


def check_fits(graph: ModelGraph, plan: Plan) -> None:
    """Every op of every distinct segment must have its placement in the plan."""
    for name, segment in graph.segments.items():
        rows = plan.placements.get(name)
        missing = [n.name for n in segment.joint.graph.nodes if is_op(n) and (rows is None or n.name not in rows)]
        if rows is None or missing:
            raise ShardwrightError(
                f"the plan has no placement for {len(missing)} ops of {name}, as {missing[0] if missing else 'all'}",
                means="the plan was made for another model, or for another version of its code",
                change="make the plan again for this model",
                works="shardwright plan MODEL --hardware NAME -o plan.json",
                exit_code=ExitCode.PLAN_MISMATCH,
            )


def build_segment_program(segment: Segment, context: ShardContext, recompute: bool) -> SegmentProgram:
    joint = shard_segment(segment, context)
    forward, backward, kept = partition(joint, segment, recompute and not segment.is_prologue)
    axes, solutions, name = context.axes, context.solutions, segment.name

    def places(key: str) -> tuple[int, ...]:
        return tuple(s.places.get((name, key), R) for s in solutions)

    def metas(kind: str, infos: tuple) -> tuple:  # type: ignore[type-arg]
        return tuple(
            (tuple(local_shape(info.shape, places(f"{kind}_{i}"), axes)), info.dtype) for i, info in enumerate(infos)
        )

    gradients = _returned_gradients(backward, segment)
    tangents = [j for j, out in enumerate(segment.outputs) if out.requires_grad]
    return SegmentProgram(
        name=name,
        forward=forward,
        backward=backward,
        num_params=len(segment.param_shapes),
        num_buffers=segment.num_buffers,
        mutated_buffers=segment.mutated_buffers,
        num_inputs=len(segment.inputs),
        num_outputs=len(segment.outputs),
        num_saved=len(kept),
        tangent_outputs=tuple(tangents),
        input_grads=tuple(gradients[len(segment.param_shapes) :]),
        param_grads=tuple(gradients[: len(segment.param_shapes)]),
        param_shards=tuple(
            {
                axis.name: place
                for axis, place in zip(axes, places(f"param_{i}"), strict=True)
                if place >= 0 and axis.size > 1
            }
            for i in range(len(segment.param_shapes))
        ),
        grad_partial_axes=tuple(_partial_axes(axes, solutions, name, i) for i in range(len(segment.param_shapes))),
        output_meta=metas("output", segment.outputs),
        input_meta=metas("input", segment.inputs),
        tangent_meta=metas("tangent", tuple(segment.outputs[j] for j in tangents)),
    )


def _returned_gradients(backward: torch.fx.GraphModule | None, segment: Segment) -> list[bool]:
    if backward is None:
        return [False] * (len(segment.param_shapes) + len(segment.inputs))
    returned = next(n for n in reversed(backward.graph.nodes) if n.op == "output").args[0]
    return [r is not None for r in returned]  # type: ignore[union-attr]


def _partial_axes(
    axes: tuple[MeshAxis, ...], solutions: tuple[AxisSolution, ...], segment: str, slot: int
) -> tuple[str, ...]:
    return tuple(
        axis.name
        for axis, s in zip(axes, solutions, strict=True)
        if axis.size > 1 and s.places.get((segment, f"param_grad_{slot}"), R) == P
    )
