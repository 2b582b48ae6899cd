"""What program.evaluate() runs: the model in evaluation mode, captured, placed and rewritten when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from . import hashes
from .costmodel.model import CostModel
from .costmodel.stacks import stack_named
from .errors import ExitCode, ShardwrightError
from .jobs import job_of_evaluation
from .ops.placement import Places
from .passes.build import build_segment_programs
from .passes.program import SegmentProgram
from .passes.redistribute import MeshAxis
from .planner.sharding.sharder import Sharder
from .planner.sharding.training import Job
from .plans.axes import MeshShape
from .plans.document import MemoryPolicy, Plan
from .profiler.as_captured import AsCaptured
from .profiler.batches import resize_batch
from .profiler.capture import capture
from .profiler.cluster import Cluster
from .profiler.graph import ModelGraph
from .profiler.hardware import parse_hardware
from .profiler.workload import Workload
from .runtime.evaluation import Evaluation
from .runtime.together import on_rank_0

Reshape = Callable[[Workload, Mapping[str, tuple[int, ...]]], Workload]


def make_evaluation(
    plan: Plan,
    workload: Workload,
    planning: Workload,
    wishes: Mapping[str, Places],
    axes: Mapping[str, MeshAxis],
    device: torch.device,
    reshape: Reshape,
    as_captured: AsCaptured,
) -> Evaluation:
    """planning: the workload at a size that is no other dimension's. wishes: how parameters lie.
    as_captured: the model as it trains, which is not asked how it stands since.

    Rank 0 solves the placements, the others receive them: every rank must call it."""
    with as_captured.restored():
        general = capture(planning, evaluating=True)
        graph = capture(resize_batch(workload, plan.microbatch.size), evaluating=True)
    placed = placed_anew(plan, general, wishes, plan.microbatch.size)
    placed = placed.model_copy(update={"memory_policy": MemoryPolicy()})
    placed = fitting(placed, general, graph, wishes)

    def rebuild(shapes: dict[str, tuple[int, ...]]) -> Mapping[str, SegmentProgram]:
        with as_captured.restored():
            other = capture(reshape(workload, shapes), evaluating=True)
        if other.wiring != graph.wiring:
            raise other_parts(f"{workload.name} in evaluation mode", shapes)
        return build_segment_programs(other, fitting(placed, graph, other, wishes), axes, device)

    return Evaluation(
        graph=graph,
        programs=build_segment_programs(graph, placed, axes, device),
        rebuild=rebuild,
        output_dims=_sample_dims(general, graph),
    )


def other_parts(model: str, shapes: Mapping[str, tuple[int, ...]]) -> ShardwrightError:
    return ShardwrightError(
        f"{model} has other parts for {', '.join(f'{n} {s}' for n, s in shapes.items())}",
        means="the program was built for the parts that it has at the size of a microbatch",
        change="the batch",
        works="samples in whole microbatches",
        exit_code=ExitCode.PLAN_MISMATCH,
    )


def fitting(plan: Plan, made_for: ModelGraph, graph: ModelGraph, wishes: Mapping[str, Places]) -> Plan:
    """The plan, with placements of the ops that the model has at this size of the batch. made_for: what it places; an
    op of the same name may be another one here. Every rank must call it."""
    same = made_for is graph or hashes.model_hash(made_for) == hashes.model_hash(graph)
    return plan if same and _is_as_even(plan, graph.batch_size) else placed_anew(plan, graph, wishes, graph.batch_size)


def _is_as_even(plan: Plan, size: int) -> bool:
    """Do dimensions that samples are a part of lie as evenly on every axis as they did? What the data axes cannot
    divide every rank runs whole; a tensor axis may hold samples times positions, of which uneven parts are others where
    the two are told apart."""
    mesh = plan.mesh.shape
    return size % (mesh.batch_ranks if size == plan.microbatch.size else mesh.ranks_per_stage) == 0


def placed_anew(plan: Plan, graph: ModelGraph, wishes: Mapping[str, Places], size: int) -> Plan:
    """Rank 0 solves, the others receive. size: of the microbatch that runs."""
    placements = on_rank_0(lambda: _placements(plan, graph, wishes, size))
    policy = plan.memory_policy.among(placements, plan.segments)
    return plan.model_copy(update={"placements": placements, "memory_policy": policy})


def _placements(
    plan: Plan, graph: ModelGraph, wishes: Mapping[str, Places], size: int
) -> dict[str, dict[str, list[str]]]:
    mesh = mesh_for(plan.mesh.shape, size)
    cost_model = CostModel(_cluster(plan), stack=stack_named(plan.stack))

    def solve(job: Job) -> dict[str, dict[str, list[str]]]:
        sharder = Sharder(graph, cost_model, wishes, job=job, axes=plan.placement_axes)
        return sharder.solve(mesh, size // mesh.batch_ranks).placements

    try:
        return solve(job_of_evaluation(plan.forced))
    except ShardwrightError:  # what was forced is not to be had at this size; all forms compute the same
        return solve(Job())


def mesh_for(mesh: MeshShape, size: int) -> MeshShape:
    """The mesh that a microbatch of this size is placed on: every rank runs one whole that does not divide."""
    return mesh if size % mesh.batch_ranks == 0 else mesh.without_batch


def _cluster(plan: Plan) -> Cluster:
    try:
        return parse_hardware(str(plan.hardware.get("name", "")))
    except ShardwrightError:  # a cluster of the planner's own making: the figures of any will do
        return parse_hardware(f"{plan.mesh.num_devices}xCPU")


def _sample_dims(general: ModelGraph, graph: ModelGraph) -> dict[str, int]:
    """Of the graph's outputs, the dimension whose size is a multiple of the batch's in the general one."""
    found = {}
    for name, like in zip(graph.outputs, general.outputs, strict=len(graph.outputs) == len(general.outputs)):
        dims = [d for d, s in enumerate(general.values[like].shape) if s and s % general.batch_size == 0]
        if dims:
            found[name] = dims[0]
    return found
