"""plan and build: from a workload to a Plan, from a Plan to this rank's Program."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import devices, hashes, trust
from .costmodel.model import CostModel
from .costmodel.stacks import OWN_STACK, Stack, stack_named
from .errors import ExitCode, ShardwrightError
from .evaluation import fitting, make_evaluation, mesh_for, other_parts
from .jobs import job_of
from .ops.placement import Places, from_text
from .passes.build import build_segment_programs
from .passes.device_kernels import refuse_missing_kernels
from .passes.fuse import fuse_model
from .passes.program import SegmentProgram
from .passes.redistribute import ExpertWays, MeshAxis
from .planner.interfaces import ShardingSolution
from .planner.search.result import SearchResult
from .planner.search.search import search
from .planner.sharding.expert_costs import expert_ranks_per_host
from .planner.sharding.pins import Pins, choices_of, is_pin
from .planner.sharding.sharder import Sharder
from .planner.sharding.training import Job
from .planner.space.forcing import parse_forced
from .plans.axes import expert_axes, placement_axes
from .plans.document import MemoryPolicy, Plan, PlanningTime, SelfTest, ShardingProof, Stage
from .profiler.as_captured import AsCaptured
from .profiler.batch_dims import with_batch_dims
from .profiler.batches import batch_dims_of, resize_batch
from .profiler.capture import capture, no_collection
from .profiler.cluster import Cluster
from .profiler.fixed_batch import refuse_fixed_batch
from .profiler.graph import LossOver, ModelGraph
from .profiler.inputs import example_batch_size, reshaped
from .profiler.models import load_workload
from .profiler.slots import PARAM, slot_name
from .profiler.watch import TimeUp, stop_at, tell, telling
from .profiler.workload import Workload
from .runtime.evaluation import Evaluation
from .runtime.mesh import RankGrid, build_mesh
from .runtime.program import Compiled, Program
from .runtime.same_values import take_rank_0s
from .runtime.together import on_rank_0
from .self_test import BUDGET_S, is_applicable
from .self_test import self_test as run_self_test
from .stage_moves import moved_policy, moved_stages

__all__ = ["Progress", "build", "capture_for_planning", "load_workload", "plan"]

Progress = Callable[[str], None]
LARGE_LOGITS = 0.5  # of a device's memory
# Kinds of models whose ops are known to be the same for every size of the batch but one.
STEADY_KINDS = ("causal-lm", "masked-lm", "seq2seq", "image-classification", "small")
# Samples in the batch that planning captures: a prime that is no other dimension's divisor, so that a dimension that
# carries the batch can be told by its size.
PLANNING_BATCHES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


def plan(
    workload: Workload | str,
    hardware: Cluster | str,
    *,
    force: Mapping[str, Any] | None = None,
    memory_limit_bytes: int | None = None,
    time_limit_s: float | None = None,
    strict: bool = False,
    self_test: bool = True,
    stack: str = OWN_STACK,
    progress: Progress | None = None,
    **workload_options: Any,
) -> Plan:
    """The fastest plan found for a training job on a cluster.

    workload: a Workload, or what load_workload takes, its options as further keywords (global_batch, seq_len, ...).
    hardware: a Cluster or a name such as "2x8xH100-80GB"; "local" is one device for each process of this job.
    force: choices to keep, such as {"pp": 2, "zero": 3}.
    memory_limit_bytes: per device. time_limit_s: of capture and search; a plan that was found is completed. strict:
    refuse ops without a sharding rule.
    self_test: where the model is your own and has real values, compare the captured graph with it first.
    stack: the software whose habits predictions have (costmodel/stacks.py); plans run here whatever it is.
    progress: called with what is being done now.

    Where torch.distributed is initialized, every rank must call it: rank 0 plans, the others receive the plan.
    Raises ShardwrightError; its exit_code says of which kind.
    """
    if isinstance(workload, str):
        workload = load_workload(workload, **workload_options)
    elif workload_options:
        raise TypeError(f"plan() got {', '.join(workload_options)}, which go with a model's name, not with a Workload")
    forced = {key: str(value) for key, value in (force or {}).items()}
    software = stack_named(stack)
    asked = _Asked(workload, hardware, forced, memory_limit_bytes, time_limit_s, strict, self_test, progress, software)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return _make_plan(asked)
    return _plan_on_rank_0(lambda: _make_plan(asked))


def _plan_on_rank_0(make: Callable[[], Plan]) -> Plan:
    """Rank 0 plans; its plan, or its error, is everyone's."""
    return Plan.model_validate_json(on_rank_0(lambda: make().to_json()))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What plan() was asked for, with the time by which it must be done."""

    workload: Workload
    hardware: Cluster | str
    force: Mapping[str, str]
    memory_limit_bytes: int | None
    time_limit_s: float | None
    strict: bool
    self_test: bool
    progress: Progress | None
    stack: Stack
    started: float = dataclasses.field(default_factory=time.monotonic)

    def say(self, message: str) -> None:
        if self.progress is not None:
            self.progress(message)

    @property
    def deadline(self) -> float:
        return float("inf") if self.time_limit_s is None else self.started + self.time_limit_s

    @property
    def left_s(self) -> float | None:
        return None if self.time_limit_s is None else max(0.0, self.deadline - time.monotonic())

    @contextlib.contextmanager
    def stopped_at(self, deadline: float, phase: str = "captured") -> Iterator[None]:
        """Inside, the time limit ends the phase with an error that names it."""
        try:
            with stop_at(deadline):
                yield
        except TimeUp:
            raise _out_of_time(self.workload, self.time_limit_s or 0.0, phase) from None


@dataclasses.dataclass(frozen=True)
class _Placing:
    """What placements are solved with, whatever graph they are for."""

    cost_model: CostModel
    pins: Pins
    job: Job

    def sharder(
        self, graph: ModelGraph, time_limit_s: float | None, wishes: Mapping[str, Places] | None = None
    ) -> Sharder:
        return Sharder(graph, self.cost_model, wishes, self.pins, time_limit_s, self.job)


@dataclasses.dataclass(frozen=True)
class _Placed:
    """The graph that will run, and what the plan says of it."""

    graph: ModelGraph
    stages: list[Stage]
    memory_policy: MemoryPolicy
    solution: ShardingSolution


@dataclasses.dataclass(frozen=True)
class Captured:
    """What is planned. graph: with the kernels fused that win on the cluster, which fusions names."""

    workload: Workload
    graph: ModelGraph
    fusions: list[str]
    loss_over: LossOver


def captured_for(workload: Workload, cost_model: CostModel, loss: str = "auto") -> Captured:
    """The same for every global batch, and on every cluster of the same devices. loss: as --force loss says."""
    workload = with_batch_dims(workload)
    graph = capture_for_planning(workload)
    tell("fusing kernels")
    asked = None if loss == "whole" else _chunks_loss(graph, cost_model, always=loss == "chunked")
    fused, fusions = fuse_model(graph, lambda dtype: _fusing_wins(cost_model, dtype), chunks_loss=asked)
    return Captured(workload, fused, fusions, graph.loss_over)


def _chunks_loss(graph: ModelGraph, cost_model: CostModel, *, always: bool) -> Callable[[int, int, int], bool]:
    """Some rows at a time, where the logits of one sample, in their own dtype, as the loss has them and as what is kept
    of it, would take more than LARGE_LOGITS of a device."""
    memory_bytes = cost_model.cluster.worst_device().memory_bytes

    def asked(rows: int, classes: int, itemsize: int) -> bool:
        of_a_sample = rows / max(1, graph.batch_size) * classes * 2.5 * itemsize
        return always or of_a_sample > LARGE_LOGITS * memory_bytes

    return asked


@no_collection()
def _make_plan(asked: _Asked) -> Plan:
    started = time.perf_counter()
    choices = choices_of(asked.force)
    parse_forced(choices)  # a mistyped key is found before the model is traced
    pins = Pins.parse({key: value for key, value in asked.force.items() if is_pin(key, value)}, placement_axes())
    cluster = devices.cluster_for_this_job(asked.hardware)
    if asked.memory_limit_bytes is not None:
        cluster = cluster.with_memory_limit(asked.memory_limit_bytes)
    asked.say(f"capturing {asked.workload.name}")
    capture_started = time.perf_counter()
    cost_model = CostModel(cluster, stack=asked.stack)
    with asked.stopped_at(asked.deadline), telling(asked.progress):
        captured = captured_for(asked.workload, cost_model, parse_forced(choices).loss)
    workload, graph, fusions = captured.workload, captured.graph, captured.fusions
    again_s = 2 * (time.perf_counter() - capture_started)  # what another capture may take, to complete a plan
    with asked.stopped_at(asked.deadline, "compared with its graph"):
        tested = _tested(workload, graph, asked)
    refuse_missing_kernels(graph, devices.device_type_of(cluster), of_this_build=False)
    capture_s = time.perf_counter() - capture_started
    asked.say("searching")
    placing = _Placing(cost_model, pins, job_of(workload, workload.global_batch, asked.force))
    left_s = asked.left_s
    found = search(
        graph,
        cost_model,
        workload,
        placing.sharder(graph, left_s),
        force=choices,
        time_limit_s=left_s,
        memory_limit_bytes=asked.memory_limit_bytes,
        progress=asked.progress,
    )
    ends = max(asked.deadline, time.monotonic() + again_s)
    with asked.stopped_at(ends, "captured again, at the size of its microbatch"):
        running = _running_graph(workload, graph, fusions, found.microbatch.size)
    placed = _Placed(graph, found.stages, found.memory_policy, found.solution)
    if running is not None:
        placed = _placed_as_it_runs(asked, found, placed, running, placing)
    if asked.strict:
        _refuse_conservative(placed.solution)
    made = Plan(
        hashes=hashes.make_hashes(placed.graph, workload, cluster),
        workload=_describe(workload),
        hardware=cluster.to_dict(),
        stack=asked.stack.name,
        mesh=found.mesh,
        microbatch=found.microbatch,
        loss_over=captured.loss_over,
        schedule=found.schedule,
        stages=placed.stages,
        segments=[instance.segment for instance in placed.graph.instances],
        placement_axes=list(placement_axes(found.mesh.shape)),
        placements=placed.solution.placements,
        zero=found.zero,
        zero_extents=found.zero_extents,
        expert_ranks_per_host=expert_ranks_per_host(placed.graph, cluster, found.mesh.shape),
        expert_chunks=placed.solution.expert_chunks,
        memory_policy=placed.memory_policy,
        fusions=fusions,
        forced=dict(asked.force),
        predicted=found.predicted.model_copy(update={"split": placed.solution.split_shares}),
        certificate=found.certificate.model_copy(update={"sharding": _proof_of(placed.solution)}),
        planning_s=PlanningTime(capture=capture_s, solve=found.seconds, total=time.perf_counter() - started),
        considered=found.considered,
        conservative_ops=list(placed.solution.conservative),
        self_test=tested,
    )
    trust.remember(made)
    return made


def _placed_as_it_runs(
    asked: _Asked, found: SearchResult, planned: _Placed, running: ModelGraph, placing: _Placing
) -> _Placed:
    """The ops that run at the microbatch's own size, placed with the memory that the search counted on."""
    size, graph = found.microbatch.size, planned.graph
    asked.say(f"placing the ops of {size} samples")
    wishes = parameter_places(graph, planned.solution.placements)
    mesh = mesh_for(found.mesh.shape, size)
    solution = placing.sharder(running, asked.left_s, wishes).solve(mesh, size // mesh.batch_ranks)
    policy = moved_policy(graph, planned.memory_policy, running).among(
        solution.placements, [instance.segment for instance in running.instances]
    )
    return _Placed(running, moved_stages(graph, planned.stages, running), policy, solution)


def _refuse_conservative(solution: ShardingSolution) -> None:
    conservative = list(solution.conservative)
    if conservative:
        first = conservative[0]
        raise ShardwrightError(
            f"{len(conservative)} ops have no sharding rule; the first is {first.op} at {first.source or first.node}",
            means="they would be replicated, or split over the batch only",
            change="--strict",
            works="leave it out: the plan then lists them with their cost",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )


def _tested(workload: Workload, graph: ModelGraph, asked: _Asked) -> SelfTest:
    if not asked.self_test:
        return SelfTest(status="off", reason="self_test=False")
    if is_applicable(workload):
        asked.say(f"self-test of {workload.name}")
    return run_self_test(workload, graph, budget_s=min(BUDGET_S, 0.5 * (asked.deadline - time.monotonic())))


def _proof_of(solution: ShardingSolution) -> ShardingProof:
    return ShardingProof(
        status=solution.status,
        objective_s=solution.objective_s,
        lower_bound_s=solution.lower_bound_s,
        gap_fraction=solution.gap_fraction,
        seconds=solution.seconds,
    )


def _running_graph(workload: Workload, graph: ModelGraph, fusions: Sequence[str], size: int) -> ModelGraph | None:
    """At the size of the microbatch, where the model has other ops there than graph: a batch of one broadcasts, and
    what branches on sizes may. None where it has the same, as kinds of models known not to branch do."""
    if size != 1 and workload.spec.get("kind") in STEADY_KINDS:
        return None
    found = _capture_for_running(resize_batch(workload, size), fusions)
    return found if hashes.model_hash(found) != hashes.model_hash(graph) else None


def parameter_places(graph: ModelGraph, placements: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, Places]:
    """Parameter -> how it lies on each axis."""
    return {
        name: tuple(map(from_text, placements[instance.segment][slot_name(PARAM, slot)]))
        for instance in graph.instances
        for slot, name in enumerate(instance.params)
    }


def _fusing_wins(cost_model: CostModel, dtype: torch.dtype) -> Callable[[int, int], bool]:
    """A fused norm is taken where its traffic saved costs more than its arithmetic: memory is a roof."""

    def wins(flops: int, bytes_saved: int) -> bool:
        saved_s = cost_model.op_seconds("aten.add.Tensor", 0.0, float(bytes_saved), dtype)
        return bytes_saved > 0 and saved_s > cost_model.op_seconds("aten.add.Tensor", float(flops), 0.0, dtype)

    return wins


def _capture_for_running(workload: Workload, fusions: Sequence[str]) -> ModelGraph:
    """At the workload's own shapes, with the kernels fused that the plan names."""
    return _fused(capture(workload), fusions)


def _fused(graph: ModelGraph, fusions: Sequence[str]) -> ModelGraph:
    """With just these kernels."""
    return fuse_model(graph, lambda dtype: lambda flops, saved: True, only=fusions)[0] if fusions else graph


def capture_of(plan: Plan, workload: Workload) -> ModelGraph:
    """The graph that the plan's placements speak of."""
    graph = _fused(capture_for_planning(workload), plan.fusions)
    if hashes.model_hash(graph) == plan.hashes.model:
        return graph
    return _capture_for_running(resize_batch(workload, plan.microbatch.size), plan.fusions)


def _out_of_time(workload: Workload, time_limit_s: float, phase: str = "captured") -> ShardwrightError:
    return ShardwrightError(
        f"the time limit of {time_limit_s:g} s passed while {workload.name} was {phase}",
        means="capture traces the model's step and the backward of each distinct part; no plan is complete yet",
        change="--time-limit",
        works=f"--time-limit {max(60, round(10 * time_limit_s))}",
        exit_code=ExitCode.TIME_LIMIT,
    )


def capture_for_planning(workload: Workload) -> ModelGraph:
    """The model's graph with a batch whose size no other dimension is a multiple of."""
    batch = planning_batch(workload)
    try:
        return capture(batch)
    except ShardwrightError as error:
        refuse_fixed_batch(workload, example_batch_size(batch), error)
        raise


def planning_batch(workload: Workload) -> Workload:
    """The workload with a batch whose size no other dimension is a multiple of."""
    dims = batch_dims_of(workload)
    sizes = {s for n, t in workload.example_batch.items() for d, s in enumerate(t.shape) if d != dims.get(n)}
    held = (*workload.model.parameters(), *workload.model.buffers())
    sizes |= {size for tensor in held for size in tensor.shape}
    batch = next((b for b in PLANNING_BATCHES if not any(size % b == 0 for size in sizes if size)), PLANNING_BATCHES[0])
    return resize_batch(workload, batch)


def _describe(workload: Workload) -> dict[str, Any]:
    """What rebuilds the workload from the command line, or what names it where only its maker can."""
    tokens = workload.tokens_per_sample
    described = {"model": workload.name, "global_batch": workload.global_batch, "seq_len": tokens or None}
    dims = {"batch_dims": dict(workload.batch_dims)} if workload.batch_dims is not None else {}
    return {**described, **workload.spec, "global_batch": workload.global_batch, **dims}


@no_collection()
def build(
    plan: Plan,
    workload: Workload,
    *,
    device: torch.device | str | None = None,
    adopt: bool = False,
    self_test: bool = True,
) -> Program:
    """This rank's Program: its stages rewritten as the plan says, its shards of the parameters initialized.

    Under torchrun, torch.distributed must be initialized and every rank must call this with the same plan. device: by
    default the plan's, the CPU or this rank's GPU, which becomes the current one. Where ranks drew other values for the
    model, all take rank 0's, as under DistributedDataParallel. adopt: where the model has real
    values on that device and nothing is sharded, use its own tensors as storage. self_test: of a model of your own with
    real values, where the plan was made without one.

    Raises ShardwrightError, exit code 7, where the plan was made for another model, shape, hardware or version.
    """
    device = torch.device(device) if device is not None else devices.device_of(plan)
    if device.type == "cuda":  # pinned memory and NCCL's object collectives go by the current one
        device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        torch.cuda.set_device(device)
    distributed = dist.is_available() and dist.is_initialized()
    hashes.verify_version(plan)
    workload = hashes.with_plans_dims(plan, workload)
    hashes.verify_shapes(plan, workload)
    hashes.verify_hardware(plan, device, dist.get_world_size() if distributed else 1)
    if distributed:
        devices.check_group(device)
        _verify_same_plan(plan)
        take_rank_0s(workload.model, device)
    as_captured = AsCaptured(workload.model)
    graph = _capture_for_running(resize_batch(workload, plan.microbatch.size), plan.fusions)
    hashes.verify_model(plan, graph)
    refuse_missing_kernels(graph, device.type, of_this_build=True)
    if self_test and (plan.self_test is None or plan.self_test.status == "not applicable"):
        on_rank_0(lambda: run_self_test(workload, graph).model_dump())
    mesh = build_mesh(plan.mesh, device.type)
    axes = _mesh_axes(RankGrid.of(mesh), plan)

    def rebuild(shapes: dict[str, tuple[int, ...]]) -> Mapping[str, SegmentProgram]:
        with as_captured.restored():
            other = _capture_for_running(_reshaped(workload, shapes), plan.fusions)
        if other.wiring != graph.wiring:
            raise other_parts(workload.name, shapes)
        return build_segment_programs(other, fitting(plan, graph, other, wishes), axes, device)

    wishes = parameter_places(graph, plan.placements)
    programs = build_segment_programs(graph, plan, axes, device)

    def evaluation() -> Evaluation:
        return make_evaluation(plan, workload, planning_batch(workload), wishes, axes, device, _reshaped, as_captured)

    compiled = Compiled(graph, programs, rebuild, evaluation)
    return Program(plan, compiled, workload, device=device, mesh=mesh, adopt=adopt)


def _verify_same_plan(plan: Plan) -> None:
    """Every rank must build from the same document."""
    own = hashes.digest(plan.model_dump(by_alias=True, mode="json"))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    different = [rank for rank, other in enumerate(found) if other != found[0]]
    if different:
        raise ShardwrightError(
            f"ranks {different} have another plan than rank 0",
            means="the ranks would wait for each other's collectives without end",
            change="the plan that each rank loads",
            works="one rank plans, or all load the same file",
            exit_code=ExitCode.PLAN_MISMATCH,
        )


def _mesh_axes(grid: RankGrid, plan: Plan) -> dict[str, MeshAxis]:
    """This rank's view of the axes that segments are sharded over."""
    found = {}
    for name in plan.placement_axes:
        group = grid.group(name).group_name if grid.size(name) > 1 else ""
        ways = ExpertWays()
        if name in expert_axes() and grid.size(name) > 1:
            per_host = plan.expert_ranks_per_host
            hop_groups = grid.make_hop_groups(name, per_host) if per_host > 1 else ("", "")
            ways = ExpertWays(per_host, plan.expert_chunks, hop_groups)
        found[name] = MeshAxis(name, grid.size(name), grid.coord(name), group, ways)
    return found


def _reshaped(workload: Workload, shapes: Mapping[str, tuple[int, ...]]) -> Workload:
    """The workload with its example batch in these shapes: what its values answer is what a forward assumes."""
    batch = {
        name: reshaped(tensor, shapes.get(name, tuple(tensor.shape))) for name, tensor in workload.example_batch.items()
    }
    dims = batch_dims_of(workload)
    size = next((shapes[name][dim] for name, dim in dims.items() if name in shapes), workload.batch_size)
    return dataclasses.replace(workload, example_batch=batch, batch_size=size)
