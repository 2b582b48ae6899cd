"""What the solver of placements is told of a job, the same wherever a plan is made, taken apart or placed anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .planner.sharding.pins import choices_of
from .planner.sharding.training import Job
from .planner.space.forcing import imbalance_of, parse_forced
from .planner.stages.setting import state_kinds
from .profiler.workload import Workload


def job_of(workload: Workload, global_batch: int, force: Mapping[str, str]) -> Job:
    """force: all that is forced, pins among it."""
    forced = parse_forced(choices_of(force))
    return replace(
        job_of_evaluation(force),
        kinds=state_kinds(workload),
        global_batch=global_batch,
        zero=3 if forced.zero is None else forced.zero,
        prefer=forced.prefer,
    )


def job_of_evaluation(force: Mapping[str, str]) -> Job:
    """Nothing is trained: of what is forced, the forms alone count."""
    forced = parse_forced(choices_of(force))
    return Job(
        attention=forced.attention,
        experts=forced.experts,
        imbalances=imbalance_of(forced.expert_imbalance),
        sequence_parallel=forced.sequence_parallel == "auto",
    )
