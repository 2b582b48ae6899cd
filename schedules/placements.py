"""Where a pipeline's virtual stages may go: a loop, a V, and what unequal stages ask for.

A V puts the first and the last stage on one rank. Where these are the heavy ones (embedding and loss), another rank
should take one of them: stages change places with others of the same pass, as long as that lowers the bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .bounds import lower_bound
from .problem import PipelineProblem
from .schedule import loop_placement, v_placement

MAX_CHANGES = 3  # exchanges of two stages


def placed(problem: PipelineProblem) -> list[PipelineProblem]:
    """The problem under each placement worth a search, whatever its own; as many stages on each rank."""
    p = problem.num_ranks
    chunks = problem.num_stages // p
    if p * chunks != problem.num_stages:
        raise ValueError(f"{problem.num_stages} stages do not spread evenly over {p} ranks")
    if p == 1:
        return [problem]
    loop = replace(problem, stage_rank=loop_placement(p, chunks))
    if chunks == 1:
        return [loop]
    shaped = replace(problem, stage_rank=v_placement(p, chunks))
    found = {candidate.stage_rank: candidate for candidate in (loop, shaped, _rebalanced(shaped))}
    return list(found.values())


def _rebalanced(problem: PipelineProblem) -> PipelineProblem:
    """Stages of the busiest rank exchanged, one after the other, where that lowers the bound most."""
    bound_s = lower_bound(problem)
    for _ in range(MAX_CHANGES):
        best = min(_exchanges(problem), key=lower_bound, default=problem)
        best_s = lower_bound(best)
        if best_s >= bound_s * (1 - 1e-9):
            break
        problem, bound_s = best, best_s
    return problem


def _exchanges(problem: PipelineProblem) -> Iterator[PipelineProblem]:
    """A stage of the busiest rank for one that lighter ranks have in the same pass."""
    p, place, work_s = problem.num_ranks, problem.stage_rank, problem.work_s
    busiest = max(range(p), key=work_s.__getitem__)
    if work_s[busiest] <= min(work_s) * (1 + 1e-9):
        return
    for stage in reversed(problem.stages_of(busiest)):
        for other in range(stage // p * p, stage // p * p + p):
            if work_s[place[other]] < work_s[busiest]:
                changed = list(place)
                changed[stage], changed[other] = place[other], place[stage]
                yield replace(problem, stage_rank=tuple(changed))
