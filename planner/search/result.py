"""The result of a search: the chosen plan, weighed and certified, in the Plan document's own types."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...costmodel.stage_times import Hop, StageTimes
from ...costmodel.timeline import Timeline
from ...plans import document as plan_document
from ...profiler.workload import Workload
from ...schedules import PipelineSchedule
from ..interfaces import ShardingSolution
from ..memory.limits import worst_host_need
from ..memory.rank_bytes import placements_of
from ..space.candidates import Candidate
from ..stages.chain import Chain, points_of
from ..stages.setting import Setting
from .certificate import certified_bound, not_searched
from .chosen import Chosen
from .outcome import considered_rows
from .state import SearchState
from .step_time import hops, tails

OPTIMAL_GAP = 1e-3


@dataclass
class SearchResult:
    """The chosen plan's parts, in the Plan document's own types, and how it was found."""

    candidate: Candidate
    mesh: plan_document.Mesh
    microbatch: plan_document.Microbatch
    schedule: plan_document.Schedule
    stages: list[plan_document.Stage]
    zero: int
    zero_extents: dict[str, int]
    segments: list[str]  # of each instance
    memory_policy: plan_document.MemoryPolicy
    predicted: plan_document.Predicted
    certificate: plan_document.Certificate
    considered: list[plan_document.Considered]
    solution: ShardingSolution
    timeline: Timeline
    seconds: float
    solve_seconds: float  # of it, in the sharding solver
    num_candidates: int
    interrupted: str = ""  # 'time limit' or 'Ctrl-C'


def _memory_policy(setting: Setting, chosen: Chosen) -> plan_document.MemoryPolicy:
    """What most instances of a segment do is said once, of their segment."""
    shape = setting.shape
    points = points_of(shape, chosen.solution, chosen.outcome.recompute)
    choices: list[plan_document.RecomputeChoice] = [
        "none" if point is None else "all" if point.is_whole else point.recomputed for point in points
    ]
    counted: dict[str, Counter[plan_document.RecomputeChoice]] = {}
    for name, choice in zip(shape.segments, choices, strict=True):
        counted.setdefault(name, Counter())[choice] += 1
    policy: dict[str, plan_document.RecomputeChoice] = dict.fromkeys(setting.graph.segments, "none")
    policy |= {name: most.most_common(1)[0][0] for name, most in counted.items()}
    apart = {
        index: choice
        for index, name, choice in zip(shape.instances, shape.segments, choices, strict=True)
        if choice != policy[name]
    }
    place: Literal["device", "host"] = "host" if chosen.candidate.on_host else "device"
    return plan_document.MemoryPolicy(recompute=policy, instances=apart, optimizer_state=place)


def build_result(state: SearchState, chosen: Chosen, started: float, interrupted: str) -> SearchResult:
    setting, candidate, chain = state.setting, chosen.candidate, chosen.chain
    bounds, timeline, step_s = chosen.bounds, chosen.timeline, chosen.step_s
    breakdowns = chosen.breakdowns(setting)
    peaks = [sum(items.values()) for items in breakdowns]
    worst = max(range(candidate.pp), key=lambda rank: peaks[rank] - setting.limit(candidate, rank))
    bound_s = certified_bound(state, step_s, tighten=not interrupted)
    host = worst_host_need(setting, candidate, chosen.memory_chain, bounds)
    gap = (step_s - bound_s) / step_s if step_s else 0.0
    workload = setting.workload
    tokens = workload.global_batch * max(1, tokens_per_sample(workload))
    flops = chain.model_flops * candidate.mesh.ranks_per_stage * candidate.count
    return SearchResult(
        candidate=candidate,
        mesh=plan_document.Mesh.of(candidate.mesh),
        microbatch=plan_document.Microbatch(size=candidate.microbatch, count=candidate.count),
        schedule=_schedule(candidate, chosen.order),
        stages=_stages(setting, candidate, chain, bounds),
        zero=candidate.zero,
        zero_extents=candidate.extents._asdict() if candidate.split is not None else {},
        segments=[instance.segment for instance in setting.graph.instances],
        memory_policy=_memory_policy(setting, chosen),
        predicted=plan_document.Predicted(
            step_s=step_s,
            step_range_s=step_range_s(setting, step_s),
            tokens_per_s_per_device=tokens / step_s / setting.cluster.num_devices,
            mfu=setting.cost_model.model_flops_utilization(flops, step_s, workload.precision.compute),
            peak_bytes=[max(peaks[rank] for rank in ranks) for ranks in zip(*placements_of(candidate), strict=True)],
            bubble_fraction=max(0.0, timeline.bubble_fraction),
            exposed_comm_s=max(timeline.exposed_comm_s),
            memory=breakdowns[worst],
            memory_limit_bytes=setting.whole_limit(candidate, worst),
            **_memory_error(setting, candidate, worst),
            host_bytes=host.needed_bytes,
            host_limit_bytes=host.limit_bytes if candidate.on_host else 0,
            stage_s=_stage_seconds(chosen.stages, hops(setting, candidate, chain, bounds)),
            rank_memory=[
                plan_document.RankMemory(**dataclasses.asdict(moments)) for moments in chosen.moments(setting)
            ],
            tail_s=[tail.optimizer_s + tail.gather_s for tail in tails(setting, candidate, chain, bounds)],
            tails_wait=setting.workload.optimizer.waits_for_norm,
        ),
        certificate=plan_document.Certificate(
            status="optimal" if gap <= OPTIMAL_GAP and not interrupted else "feasible",
            lower_bound_s=bound_s,
            gap_fraction=gap,
            not_searched=not_searched(state),
        ),
        considered=considered_rows(state.candidates, state.outcomes, chosen.outcome, interrupted, order_error(setting)),
        solution=chosen.solution,
        timeline=timeline,
        seconds=time.monotonic() - started,
        solve_seconds=state.solve_seconds,
        num_candidates=len(state.candidates),
        interrupted=interrupted,
    )


def _memory_error(setting: Setting, candidate: Candidate, rank: int) -> dict[str, Any]:
    """What is left free of the rank's limit, and how far off the prediction may be."""
    device = setting.mesh(candidate).devices[rank]
    return {
        "memory_margin_bytes": setting.whole_limit(candidate, rank) - setting.limit(candidate, rank),
        "memory_error": setting.memory_error(device),
        "memory_sure": setting.memory_sure(device),
    }


def step_range_s(setting: Setting, step_s: float) -> list[float]:
    """Between which times eight of ten published runs were, of those predicted to take this long; empty where nothing
    is known, as of CPUs."""
    spread = setting.cost_model.stack.spread
    return [step_s * share for share in spread] if spread and setting.cost_model.cluster.is_accelerated else []


def order_error(setting: Setting) -> float:
    """What two steps may differ by, as predicted, that measured ones do not."""
    return setting.cost_model.stack.order_error if setting.cost_model.cluster.is_accelerated else 0.0


def _schedule(candidate: Candidate, own: PipelineSchedule | None) -> plan_document.Schedule:
    if own is None:
        return plan_document.Schedule(name=candidate.schedule, virtual_stages=candidate.virtual_stages)
    return plan_document.Schedule(
        name=own.name,
        virtual_stages=candidate.virtual_stages,
        stage_rank=list(own.stage_rank),
        order=[" ".join(map(str, row)) for row in own.ranks],
    )


def _stage_seconds(stages: Sequence[StageTimes], hops: Sequence[Hop]) -> list[plan_document.StageSeconds]:
    return [
        plan_document.StageSeconds(
            forward_s=times.forward_s,
            backward_input_s=times.backward_input_s,
            backward_weight_s=times.backward_weight_s,
            reduce_s=times.reduce_s,
            send_s=hop.forward_occupancy_s,
            send_back_s=hop.backward_occupancy_s,
            send_latency_s=hop.forward_latency_s,
            send_back_latency_s=hop.backward_latency_s,
            offload_s=times.offload_s,
            activation_bytes=times.activation_bytes,
            recompute_bytes=times.recompute_bytes,
            offload_bytes=times.offload_bytes,
        )
        for times, hop in zip(stages, (*hops, Hop()), strict=True)
    ]


def tokens_per_sample(workload: Workload) -> int:
    """Sequence length; as Workload says: dimension 1 of the first integer tensor of the batch, else 1."""
    if workload.tokens_per_sample:
        return workload.tokens_per_sample
    for tensor in workload.example_batch.values():
        if not tensor.is_floating_point() and tensor.dim() > 1:
            return int(tensor.shape[1])
    return 1


def _stages(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> list[plan_document.Stage]:
    mesh, holders = setting.mesh(candidate), list(zip(*placements_of(candidate), strict=True))
    return [
        plan_document.Stage(
            segments=[
                *chain.prologue_of(bounds[stage], bounds[stage + 1]),
                *setting.shape.instances[bounds[stage] : bounds[stage + 1]],
            ],
            ranks=[rank for place in dict.fromkeys(holders[stage]) for rank in mesh.ranks_of(place)],
        )
        for stage in range(candidate.num_stages)
    ]
