"""From a captured model and a plan to the programs that this rank runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import fx

from ..errors import ExitCode, ShardwrightError
from ..ops.placement import P, R
from ..plans.document import Plan, RecomputeChoice
from ..plans.order import splits_backward
from ..plans.placements import AxisSolution, is_kept_key, read_placements
from ..profiler.graph import ModelGraph, Segment
from ..profiler.op_view import is_op
from ..profiler.slots import INPUT, OUTPUT, PARAM, PARAM_GRAD, TANGENT, slot_name, slot_names
from .expert_dispatch import send_again
from .improve import Part, dump, improve_backward, improve_forward
from .partition import Recompute, partition
from .program import SegmentProgram, own_key
from .redistribute import MeshAxis
from .shard import ShardContext, local_shape, shard_segment
from .split import SplitBackward
from .values import memory_roots, propagate
from .verify import verify


def build_segment_programs(
    graph: ModelGraph,
    plan: Plan,
    axes: Mapping[str, MeshAxis],
    device: torch.device,
    only: Collection[str] | None = None,
) -> dict[str, SegmentProgram]:
    """axes: this rank's view of each mesh axis inside a stage. only: the distinct segments that this rank runs."""
    check_fits(graph, plan)
    splits = splits_backward(plan)
    solutions = read_placements(plan.placements, len(plan.placement_axes))
    whole = MeshAxis("", 1, 0, "")
    context = ShardContext(tuple(axes.get(name, whole) for name in plan.placement_axes), tuple(solutions), device)
    names = graph.segments if only is None else only
    programs: dict[str, SegmentProgram] = {}
    built: dict[tuple[str, RecomputeChoice], SegmentProgram] = {}
    for key, segment, choice in _choices(graph, plan):
        if segment in names:
            if (segment, choice) not in built:
                built[segment, choice] = build_segment_program(
                    graph.segments[segment], context, _recomputed(choice), splits, label=key
                )
            programs[key] = built[segment, choice]
    return programs


def _choices(graph: ModelGraph, plan: Plan) -> Iterator[tuple[str, str, RecomputeChoice]]:
    """(key among the programs, distinct segment, what its backward makes again)."""
    policy = plan.memory_policy
    for name in graph.segments:
        yield name, name, policy.choice(name)
    segments = {instance.index: instance.segment for instance in graph.instances}
    for index, choice in policy.instances.items():
        if index in segments:
            yield own_key(index), segments[index], choice


def _recomputed(choice: RecomputeChoice) -> Recompute:
    return choice == "all" if isinstance(choice, str) else choice


def check_fits(graph: ModelGraph, plan: Plan) -> None:
    """Every op of every distinct segment must have its placement in the plan; what is made again is of a forward."""
    for name, segment in graph.segments.items():
        rows = plan.placements.get(name)
        missing = [n.name for n in segment.joint.graph.nodes if is_op(n) and (rows is None or n.name not in rows)]
        if rows is None or missing:
            raise _of_another_model(
                f"the plan has no placement for {len(missing)} ops of {name}, as {missing[0] if missing else 'all'}"
            )
    for _, name, choice in _choices(graph, plan):
        nodes = graph.segments[name].joint.graph.nodes
        forward = {n.name for n in nodes if is_op(n) and n.meta.get("phase") != "backward"}
        again = () if isinstance(choice, str) else choice
        if strangers := [op for op in again if op not in forward and not is_kept_key(op)]:
            raise _of_another_model(f"the plan makes {strangers[0]} of {name} again, which is no result of its forward")


def _of_another_model(what: str) -> ShardwrightError:
    return ShardwrightError(
        what,
        means="the plan was made for another model, or for another version of its code",
        change="make the plan again for this model",
        works="shardwright plan MODEL --hardware NAME -o plan.json",
        exit_code=ExitCode.PLAN_MISMATCH,
    )


def build_segment_program(
    segment: Segment, context: ShardContext, recompute: Recompute, splits: bool = False, label: str = ""
) -> SegmentProgram:
    """label: in the names of dumped graphs, the segment's own by default. splits: the backward also as two programs, of
    the inputs' gradients and of the parameters'. Not where the forward runs again in it: between the two, all that was
    recomputed would have to be held."""
    axes, solutions, name = context.axes, context.solutions, segment.name

    def places(key: str) -> tuple[int, ...]:
        return tuple(s.places.get((name, key), R) for s in solutions)

    joint = shard_segment(segment, context)
    given = {node.name: node.meta.get("val") for node in segment.joint.graph.nodes if node.op == "placeholder"}
    propagate(
        joint.graph,
        {
            key: torch.empty(local_shape(v.shape, places(key), axes), dtype=v.dtype, device="meta")
            for key, v in given.items()
            if isinstance(v, torch.Tensor)
        },
        context.device,
    )
    label = label or name
    dump(joint, f"{label}.joint.0-shard")
    recompute = False if segment.is_prologue else recompute
    repeats = bool(recompute)
    if not isinstance(recompute, bool):
        send_again(joint.graph, recompute)
    forward, backward, kept = partition(joint, segment, recompute)
    dump(forward, f"{label}.forward.0-partition")
    first = Part(label, "forward", forward, len(segment.param_shapes))
    improve_forward(first)
    into_slots: tuple[int, ...] = ()
    split: SplitBackward | None = None
    if backward is not None:
        dump(backward, f"{label}.backward.0-partition")
        second = replace(first, phase="backward", module=backward, owned=own_kept(forward.graph, kept))
        split = improve_backward(second, splits and not repeats)
        into_slots = second.into_slots
    collectives = verify(segment, context, forward, [backward] if backward is not None else [], repeats)
    if split is not None:
        verify(segment, context, forward, [split.inputs, split.weights], repeats)

    def metas(kind: str, infos: tuple) -> tuple:  # type: ignore[type-arg]
        named = zip(slot_names(kind, len(infos)), infos, strict=True)
        return tuple((tuple(local_shape(info.shape, places(name), axes)), info.dtype) for name, info in named)

    def shards(kind: str, count: int) -> tuple[dict[str, int], ...]:
        return tuple(
            {a.name: place for a, place in zip(axes, places(name), strict=True) if place >= 0 and a.size > 1}
            for name in slot_names(kind, count)
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
        param_shards=shards(PARAM, len(segment.param_shapes)),
        grad_partial_axes=tuple(_partial_axes(axes, solutions, name, i) for i in range(len(segment.param_shapes))),
        output_meta=metas(OUTPUT, segment.outputs),
        output_shards=shards(OUTPUT, len(segment.outputs)),
        input_meta=metas(INPUT, segment.inputs),
        into_slots=into_slots,
        split=split,
        collectives=collectives,
        tangent_meta=metas(TANGENT, tuple(segment.outputs[j] for j in tangents)),
    )


def own_kept(forward: fx.Graph, kept: list[str]) -> frozenset[str]:
    """Kept tensors whose memory the forward made and nothing else that it returns shares: the backward's to use up."""
    roots = memory_roots(forward)
    output = next(node for node in reversed(forward.nodes) if node.op == "output")
    results = [roots[node] for node in output.args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]
    count = Counter(root for found in results for root in found)
    own = results[len(results) - len(kept) :]
    return frozenset(
        name
        for name, found in zip(kept, own, strict=True)
        if len(found) == 1 and all(root.op != "placeholder" and count[root] == 1 for root in found)
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
        if axis.size > 1 and s.places.get((segment, slot_name(PARAM_GRAD, slot)), R) == P
    )
