"""What program.evaluate() runs: the model in evaluation mode, captured, placed and rewritten when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .costmodel.model import CostModel
from .errors import ShardwrightError
from .passes.build import build_segment_programs, fits
from .passes.program import SegmentProgram
from .passes.redistribute import MeshAxis
from .planner.sharding.sharder import Sharder
from .plans.document import MemoryPolicy, Plan
from .plans.placements import read_placements
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
    wishes: Mapping[str, int],
    axes: Mapping[str, MeshAxis],
    device: torch.device,
    reshape: Reshape,
) -> Evaluation:
    """planning: the workload at a size that is no other dimension's. wishes: how parameters lie over the tensor axis.

    Rank 0 solves the placements, the others receive them: every rank must call it."""
    general = capture(planning, evaluating=True)
    graph = capture(resize_batch(workload, plan.microbatch.size), evaluating=True)
    placed = placed_anew(plan, general, wishes, plan.microbatch.size)
    placed = placed.model_copy(update={"memory_policy": MemoryPolicy()})
    placed = fitting(placed, graph, wishes)

    def rebuild(shapes: dict[str, tuple[int, ...]]) -> Mapping[str, SegmentProgram]:
        other = capture(reshape(workload, shapes), evaluating=True)
        return build_segment_programs(other, fitting(placed, other, wishes), axes, device)

    return Evaluation(
        graph=graph,
        programs=build_segment_programs(graph, placed, axes, device),
        rebuild=rebuild,
        axes=plan.placement_axes,
        solutions=read_placements(placed.placements, len(plan.placement_axes)),
        output_dims=_sample_dims(general),
    )


def fitting(plan: Plan, graph: ModelGraph, wishes: Mapping[str, int]) -> Plan:
    """The plan, with placements of the ops that the model has at this size of the batch. Every rank must call it."""
    return plan if fits(graph, plan) else placed_anew(plan, graph, wishes, graph.batch_size)


def placed_anew(plan: Plan, graph: ModelGraph, wishes: Mapping[str, int], size: int) -> Plan:
    """Rank 0 solves, the others receive. size: of the microbatch that runs."""
    placements = on_rank_0(lambda: _placements(plan, graph, wishes, size))
    return plan.model_copy(update={"placements": placements})


def _placements(plan: Plan, graph: ModelGraph, wishes: Mapping[str, int], size: int) -> dict[str, dict[str, list[str]]]:
    mesh = plan.mesh
    dp = mesh.dp if size % mesh.dp == 0 else 1
    sharder = Sharder(graph, CostModel(_cluster(plan)), wishes)
    return sharder.solve(dp=dp, tp=mesh.tp, local_batch=size // dp).placements


def _cluster(plan: Plan) -> Cluster:
    try:
        return parse_hardware(str(plan.hardware.get("name", "")))
    except ShardwrightError:  # a cluster of the planner's own making: the figures of any will do
        return parse_hardware(f"{plan.mesh.num_devices}xCPU")


def _sample_dims(graph: ModelGraph) -> dict[str, int]:
    """Of the outputs, whose sizes are multiples of the batch's there."""
    found = {}
    for name in graph.outputs:
        dims = [d for d, s in enumerate(graph.values[name].shape) if s and s % graph.batch_size == 0]
        if dims:
            found[name] = dims[0]
    return found
