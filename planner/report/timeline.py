"""The timeline that a plan predicts, from its document alone."""

from __future__ import annotations

from dataclasses import replace

from ...costmodel.stage_times import Hop, StageTimes, Tail
from ...costmodel.trace import Trace
from ...plans.document import Plan
from ...plans.order import pipeline_schedule


def predicted_trace(plan: Plan) -> Trace:
    """One step; the events of a pipeline rank stand on every global rank that it consists of."""
    pp = plan.mesh.pp
    schedule = pipeline_schedule(plan)
    rows = plan.predicted.stage_s
    stages = [
        StageTimes(
            row.forward_s,
            row.backward_input_s,
            row.backward_weight_s,
            offload_s=row.offload_s,
            reduce_s=row.reduce_s,
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
    trace = made.trace()
    width = plan.mesh.num_devices // pp
    members: list[list[int]] = [[] for _ in range(pp)]
    for stage, rank in zip(plan.stages, schedule.stage_rank, strict=True):
        members[rank] = stage.ranks[:width]
    events = [replace(event, rank=rank) for event in trace.events for rank in members[event.rank]]
    return Trace(trace.source, tuple(events), trace.meta)
