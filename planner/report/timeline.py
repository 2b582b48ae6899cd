"""The timeline that a plan predicts, from its document alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...costmodel.ledger import RankLedger, ledgers
from ...costmodel.memory import RankMoments
from ...costmodel.stage_times import Hop, StageTimes, Tail
from ...costmodel.timeline import Timeline
from ...costmodel.trace import Trace
from ...plans.document import Plan
from ...plans.order import pipeline_schedule


def predicted_trace(plan: Plan) -> Trace:
    """One step; the events of a pipeline rank, and its memory, stand on every global rank that it consists of."""
    made, stages = _simulated(plan)
    members = _members(plan)
    trace = made.trace()
    events = [replace(event, rank=rank) for event in trace.events for rank in members[event.rank]]
    memory = [
        replace(sample, rank=rank)
        for ledger in _ledgers(plan, made, stages)
        for rank in members[ledger.rank]
        for sample in ledger.samples
    ]
    return Trace(trace.source, tuple(events), trace.meta, tuple(memory))


def memory_ledgers(plan: Plan) -> list[RankLedger]:
    """Of each pipeline rank, the worst of the global ranks that it consists of. Empty where the plan, of an earlier
    version, does not say it."""
    return _ledgers(plan, *_simulated(plan))


def _ledgers(plan: Plan, made: Timeline, stages: Sequence[StageTimes]) -> list[RankLedger]:
    rows = plan.predicted.rank_memory
    if len(rows) != plan.mesh.pp:
        return []
    return ledgers(made, stages, [RankMoments(**row.model_dump()) for row in rows])


def _simulated(plan: Plan) -> tuple[Timeline, list[StageTimes]]:
    schedule = pipeline_schedule(plan)
    rows = plan.predicted.stage_s
    stages = [
        StageTimes(
            row.forward_s,
            row.backward_input_s,
            row.backward_weight_s,
            offload_s=row.offload_s,
            reduce_s=row.reduce_s,
            activation_bytes=row.activation_bytes,
            recompute_bytes=row.recompute_bytes,
            offload_bytes=row.offload_bytes,
        )
        for row in rows
    ]
    hops = [Hop(row.send_latency_s, row.send_s, row.send_back_latency_s, row.send_back_s) for row in rows[:-1]]
    tails = [Tail(optimizer_s=seconds) for seconds in plan.predicted.tail_s]
    made = schedule.simulate(
        stages,
        hops,
        tails=tails,
        wait_for_all=plan.predicted.tails_wait,
        with_events=True,
        with_memory=False,
    )
    return made, stages


def _members(plan: Plan) -> list[list[int]]:
    """Global ranks of each pipeline rank."""
    width = plan.mesh.num_devices // plan.mesh.pp
    members: list[list[int]] = [[] for _ in range(plan.mesh.pp)]
    for stage, rank in zip(plan.stages, pipeline_schedule(plan).stage_rank, strict=True):
        members[rank] = stage.ranks[:width]
    return members
