"""The order of actions of a plan: of a published schedule, or its own."""

from __future__ import annotations

from ..costmodel.actions import OFFLOAD, RECOMPUTE, Action, parse_action
from ..errors import ExitCode, ShardwrightError
from ..schedules import SCHEDULES, PipelineSchedule, build_schedule
from ..schedules.published.library import canonical_name
from ..schedules.schedule import SYNTHESIZED
from .document import Plan


def pipeline_schedule(plan: Plan, num_microbatches: int | None = None) -> PipelineSchedule:
    """Of a step with so many microbatches; as many as the plan says by default.

    A plan's own order is for the plan's number. For fewer, the rest of them is left out: what remains depends on
    nothing of it. For more, it is repeated.
    """
    count = plan.microbatch.count if num_microbatches is None else num_microbatches
    if plan.schedule.name != SYNTHESIZED:
        return build_schedule(plan.schedule.name, plan.mesh.pp, count, plan.schedule.virtual_stages)
    try:
        own = [[parse_action(text) for text in row.split()] for row in plan.schedule.order]
        if len(own) != plan.mesh.pp or len(plan.schedule.stage_rank) != len(plan.stages):
            raise ValueError(f"{len(own)} rows of actions and {len(plan.schedule.stage_rank)} stages")
        made = _of_rows(own, plan, count)
        made.check()
    except ValueError as error:
        raise ShardwrightError(
            f"the plan's order of actions cannot be run: {error}",
            means="the plan was edited",
            change="make the plan again",
            works="shardwright plan MODEL --hardware NAME --force schedule=auto",
            exit_code=ExitCode.PLAN_MISMATCH,
        ) from None
    return made


def _of_rows(own: list[list[Action]], plan: Plan, count: int) -> PipelineSchedule:
    planned = plan.microbatch.count
    ranks = tuple(
        tuple(
            action._replace(microbatch=action.microbatch + start)
            for start in range(0, count, planned)
            for action in row
            if action.microbatch + start < count
        )
        for row in own
    )
    return PipelineSchedule(SYNTHESIZED, count, tuple(plan.schedule.stage_rank), ranks)


def num_activations(plan: Plan) -> int:
    """Of one stage and one microbatch each."""
    return len(plan.stages) * plan.microbatch.count


def num_let_go(plan: Plan) -> tuple[int, int]:
    """Activations, of one stage and one microbatch each, that the plan's order recomputes, and that it offloads. Raises
    ShardwrightError where the order cannot be run."""
    if not plan.schedule.order:
        return 0, 0
    schedule = pipeline_schedule(plan)
    return len(schedule.places(RECOMPUTE)), len(schedule.places(OFFLOAD))


def splits_backward(plan: Plan) -> bool:
    if plan.schedule.name == SYNTHESIZED:
        return pipeline_schedule(plan).splits_backward
    return plan.mesh.pp > 1 and SCHEDULES[canonical_name(plan.schedule.name)].splits_backward
