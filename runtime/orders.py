"""The order of actions of a step, by the plan's schedule and the ranks that hold its stages."""

from __future__ import annotations

from collections.abc import Sequence

from ..costmodel.actions import FORWARD, Action
from ..errors import ExitCode, ShardwrightError
from ..planner.schedules import PipelineSchedule, build_schedule, forward_only, loop_placement


def schedule_for(name: str, stage_rank: Sequence[int], num_microbatches: int) -> PipelineSchedule:
    """stage_rank: pipeline coordinate of each virtual stage. Raises ShardwrightError where the schedule places stages
    otherwise, or holds each of them on two ranks."""
    num_ranks = max(stage_rank) + 1
    schedule = build_schedule(name, num_ranks, num_microbatches, len(stage_rank) // num_ranks)
    if schedule.reverse_stage_rank:
        raise ShardwrightError(
            f"schedule {schedule.name} runs microbatches in two directions",
            means="it holds each stage on two ranks, which the runtime does not do",
            change="--force schedule=NAME",
            works="--force schedule=1f1b",
        )
    if schedule.stage_rank != tuple(stage_rank):
        raise ShardwrightError(
            f"schedule {schedule.name} has its stages on pipeline ranks {list(schedule.stage_rank)}, the plan on "
            f"{list(stage_rank)}",
            means="the plan was edited",
            change="make the plan again",
            works=f"shardwright plan MODEL --hardware NAME --force schedule={schedule.name}",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    return schedule


def forward_order(stage_rank: Sequence[int], num_microbatches: int) -> PipelineSchedule:
    """Forwards only, for evaluation: the looped order where stages loop over the ranks, else one microbatch after the
    other, which any placement can follow."""
    num_ranks = max(stage_rank) + 1
    num_chunks = len(stage_rank) // num_ranks
    if tuple(stage_rank) == loop_placement(num_ranks, num_chunks):
        return forward_only(num_ranks, num_microbatches, num_chunks)
    ranks = tuple(
        tuple(
            Action(FORWARD, stage, microbatch)
            for microbatch in range(num_microbatches)
            for stage, place in enumerate(stage_rank)
            if place == rank
        )
        for rank in range(num_ranks)
    )
    return PipelineSchedule("forward_only", num_microbatches, tuple(stage_rank), ranks)
