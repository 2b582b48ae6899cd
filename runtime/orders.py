"""The order of actions of a step, by the plan's schedule and the ranks that hold its stages."""

from __future__ import annotations

from ..costmodel.actions import FORWARD, Action
from ..errors import ExitCode, ShardwrightError
from ..plans.document import Plan
from ..plans.order import pipeline_schedule
from ..schedules import PipelineSchedule


def schedule_for(plan: Plan, stage_rank: tuple[int, ...], num_microbatches: int) -> PipelineSchedule:
    """stage_rank: pipeline coordinate of each virtual stage, in the first direction. Raises ShardwrightError where the
    schedule places stages otherwise."""
    schedule = pipeline_schedule(plan, num_microbatches)
    if schedule.stage_rank != stage_rank:
        raise ShardwrightError(
            f"schedule {schedule.name} has its stages on pipeline ranks {list(schedule.stage_rank)}, the plan on "
            f"{list(stage_rank)}",
            means="the plan was edited",
            change="make the plan again",
            works=f"shardwright plan MODEL --hardware NAME --force schedule={schedule.name}",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    return schedule


def forward_order(stage_rank: tuple[int, ...], num_microbatches: int) -> PipelineSchedule:
    """Forwards only, for evaluation, under any placement: were all forwards equally long, each rank would always run
    the last stage that has a microbatch waiting."""
    num_stages, num_ranks = len(stage_rank), max(stage_rank) + 1
    ranks: list[list[Action]] = [[] for _ in range(num_ranks)]
    done = [0] * num_stages  # microbatches that each stage has run
    while done[-1] < num_microbatches:
        waiting = [num_microbatches, *done[:-1]]
        chosen = {stage_rank[s]: s for s in range(num_stages) if done[s] < waiting[s]}
        for rank, stage in chosen.items():
            ranks[rank].append(Action(FORWARD, stage, done[stage]))
            done[stage] += 1
    return PipelineSchedule("forward_only", num_microbatches, stage_rank, tuple(map(tuple, ranks)))
