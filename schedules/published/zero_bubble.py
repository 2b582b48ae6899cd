"""Zero-bubble schedules of one stage on a rank, and 2BP: the backward in two halves, the second moved into bubbles."""

from __future__ import annotations

from dataclasses import replace

from ...costmodel.actions import BACKWARD, Action
from ...costmodel.stage_times import StageTimes
from ..schedule import PipelineSchedule, loop_placement


def zb_h1(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """1F1B's order of forwards and input gradients; rank r puts weight gradients off by r microbatches.

    Qi et al., Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 2.2. Bubble (p-1)(F + I - W) where F = I = W;
    every rank holds min(m, p) microbatches, as many as 1F1B's first rank.
    """
    p, m = num_ranks, num_microbatches
    ranks = [_delayed(rank, m, warm_up=p - rank, delay=rank) for rank in range(p)]
    return PipelineSchedule("zb_h1", m, loop_placement(p, 1), tuple(ranks))


def zb_h2(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Twice the warm-up forwards, so that no rank is ever idle between its first and its last action.

    arXiv:2401.10241, section 2.3. Bubble (p-1)(F + I - 2 W), which is none where F = I = W: each rank works from its
    first forward on; every rank holds min(m, 2p-1) microbatches. The gain over ZB-H1 shows where the next step may
    start before all ranks have ended.
    """
    p, m = num_ranks, num_microbatches
    ranks = [_delayed(rank, m, warm_up=2 * (p - rank) - 1, delay=2 * rank) for rank in range(p)]
    return PipelineSchedule("zb_h2", m, loop_placement(p, 1), tuple(ranks))


def _delayed(stage: int, m: int, warm_up: int, delay: int) -> tuple[Action, ...]:
    """warm_up forwards, then input gradient, weight gradient of `delay` microbatches ago, forward, in turn."""
    actions = [Action("F", stage, i) for i in range(min(m, warm_up))]
    next_forward, next_weight = len(actions), 0
    for i in range(m):
        actions.append(Action("I", stage, i))
        if i >= delay:
            actions.append(Action("W", stage, next_weight))
            next_weight += 1
        if next_forward < m:
            actions.append(Action("F", stage, next_forward))
            next_forward += 1
    actions += [Action("W", stage, i) for i in range(next_weight, m)]
    return tuple(actions)


def two_bp(schedule: PipelineSchedule, times: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> PipelineSchedule:
    """The same order of forwards and input gradients; each weight gradient where the rank would wait, else at the end.

    Rae et al., 2BP: 2-Stage Backpropagation, arXiv:2405.18047. Never slower than the schedule with the backward whole;
    activations stay until their weight gradient. times: F, I, W that tell where a rank waits, the same on every stage.
    """
    without = replace(schedule, ranks=tuple(_input_gradients_only(row) for row in schedule.ranks))
    stages = [StageTimes(times[0], times[1], 0.0)] * schedule.num_stages
    plain = replace(
        without,
        ranks=tuple(tuple(a._replace(kind=BACKWARD) if a.kind == "I" else a for a in row) for row in without.ranks),
    ).simulate(stages, with_memory=False)
    ranks = []
    for rank, row in enumerate(without.ranks):
        waiting: list[Action] = []
        actions: list[Action] = []
        clock = 0.0  # with the weight gradients that have been put in; starts only move later where there was idle time
        for action, start in zip(row, plain.starts[rank], strict=True):
            while waiting and clock + times[2] <= start + 1e-9:
                actions.append(waiting.pop(0))
                clock += times[2]
            clock = max(clock, start) + (times[0] if action.kind == "F" else times[1])
            actions.append(action)
            if action.kind == "I":
                waiting.append(action._replace(kind="W"))
        ranks.append(tuple(actions + waiting))
    return replace(schedule, name=f"{schedule.name}_2bp", ranks=tuple(ranks))


def _input_gradients_only(row: tuple[Action, ...]) -> tuple[Action, ...]:
    return tuple(a._replace(kind="I") if a.kind == BACKWARD else a for a in row if a.kind != "W")
