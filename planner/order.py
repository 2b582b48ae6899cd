"""The order of actions of a plan: of a published schedule, or its own."""

from __future__ import annotations

from ..costmodel.actions import parse_action
from .plan import Plan
from .schedules import SCHEDULES, PipelineSchedule, build_schedule

SYNTHESIZED = "synthesized"


def pipeline_schedule(plan: Plan, num_microbatches: int | None = None) -> PipelineSchedule:
    """Of a step with so many microbatches; as many as the plan says by default.

    A plan's own order is for the plan's number. For fewer, the rest of them is left out: what remains depends on
    nothing of it. For more, it is repeated.
    """
    planned = plan.microbatch.count
    count = planned if num_microbatches is None else num_microbatches
    if plan.schedule.name != SYNTHESIZED:
        return build_schedule(plan.schedule.name, plan.mesh.pp, count, plan.schedule.virtual_stages)
    own = [[parse_action(text) for text in row.split()] for row in plan.schedule.order]
    ranks = tuple(
        tuple(
            action._replace(microbatch=action.microbatch + start)
            for start in range(0, count, planned)
            for action in row
            if action.microbatch + start < count
        )
        for row in own
    )
    made = PipelineSchedule(SYNTHESIZED, count, tuple(plan.schedule.stage_rank), ranks)
    made.check()
    return made


def splits_backward(plan: Plan) -> bool:
    if plan.schedule.name == SYNTHESIZED:
        return pipeline_schedule(plan).splits_backward
    return plan.mesh.pp > 1 and SCHEDULES[plan.schedule.name].splits_backward
