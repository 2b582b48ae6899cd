"""Schedules whose orders follow from a placement and a rule of preference: Hanayo, Chimera, BitPipe.

The papers draw them for m = p; list scheduling by the same preferences gives them for any p and m.
"""

from __future__ import annotations

from functools import lru_cache

from ...costmodel.actions import Action
from ...costmodel.stage_times import Hop, StageTimes
from ..list_scheduling import Lane, Listing, Targets, list_schedule
from ..problem import PipelineProblem
from ..schedule import PipelineSchedule, loop_placement, v_placement

UNIT = StageTimes(1.0, 2.0, 0.0, activation_bytes=1)  # backward twice the forward
LEADS = (0.0, 1e6)  # backwards at their turn, or before any forward


@lru_cache(maxsize=64)
def hanayo(num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> PipelineSchedule:
    """Waves: chunks go down the ranks and up again, v/2 times, with 1F1B's rule.

    Liu et al., Hanayo, arXiv:2308.15762. Turns need no transfer, and a wave's way down and up fills what 1F1B leaves
    idle. No more than p microbatches' activations on a rank.
    """
    p, m, v = num_ranks, num_microbatches, num_chunks
    placement = v_placement(p, v)
    problem = _problem(p, m, placement, limit=max(p, 1) * v)
    lane = Lane(placement, 0, m)
    return PipelineSchedule("hanayo", m, placement, _best(problem, [lane]))


@lru_cache(maxsize=64)
def chimera(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Two pipelines of opposite direction, each with half of the microbatches; each rank holds two stages' weights.

    Li and Hoefler, Chimera, arXiv:2107.06925. With m = p even and F = B the bubble is p-2 actions, half of 1F1B's;
    weights are held twice, and each stage's gradients are summed between its two ranks.
    """
    placement = loop_placement(num_ranks, 1)
    return _two_way("chimera", num_ranks, num_microbatches, placement, limit=num_ranks)


@lru_cache(maxsize=64)
def bitpipe(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """Chimera's two directions, each a V of two chunks on a rank.

    Wu et al., BitPipe, arXiv:2410.19367. Four chunks on a rank, two of each direction; weights are held twice.
    """
    placement = v_placement(num_ranks, 2)
    return _two_way("bitpipe", num_ranks, num_microbatches, placement, limit=2 * (num_ranks + 1))


def _two_way(name: str, p: int, m: int, placement: tuple[int, ...], limit: int) -> PipelineSchedule:
    down = m - m // 2
    reverse = tuple(p - 1 - rank for rank in placement)
    lanes = [Lane(placement, 0, down), Lane(reverse, down, m - down)]
    least = 2 * len(placement) // p  # room for one microbatch of each direction
    problem = _problem(p, m, placement, max(limit, least))
    if name == "chimera" and m == p and p % 2 == 0:
        return PipelineSchedule(name, m, placement, _woven(p, lanes), reverse, down)
    return PipelineSchedule(name, m, placement, _best(problem, lanes), reverse, down)


def _woven(p: int, lanes: list[Lane]) -> tuple[tuple[Action, ...], ...]:
    """The paper's own order for m = p: were F and B one unit, each direction would take every second unit of a rank.

    Microbatch i of a direction starts 2 i after its first; the directions differ by p - 1, which is odd.
    """
    rows: list[list[tuple[int, Action]]] = [[] for _ in range(p)]
    for lane in lanes:
        num_stages = len(lane.stage_rank)
        for stage, rank in enumerate(lane.stage_rank):
            for i in range(lane.num_microbatches):
                microbatch = lane.first_microbatch + i
                rows[rank].append((stage + 2 * i, Action("F", stage, microbatch)))
                rows[rank].append((2 * num_stages - 1 - stage + 2 * i, Action("B", stage, microbatch)))
    return tuple(tuple(action for _, action in sorted(row)) for row in rows)


def _problem(p: int, m: int, placement: tuple[int, ...], limit: int) -> PipelineProblem:
    num_stages = len(placement)
    return PipelineProblem(m, placement, (UNIT,) * num_stages, (Hop(),) * (num_stages - 1), (float(limit),) * p)


def _best(problem: PipelineProblem, lanes: list[Lane]) -> tuple[tuple[Action, ...], ...]:
    """The shortest list under a few preferences."""
    found: Listing | None = None
    num_stages, m = problem.num_stages, problem.num_microbatches
    work_s = max(problem.work_s) * len(lanes)
    paces = [(pace, 2.0 * pace, period) for pace in (1.0, 2.0) for period in (work_s, 0.5 * work_s, 2.0 * work_s)]
    for forward_pace, backward_pace, period_s in ((1.0, 1.0, 2.0), *paces):
        forward = [forward_pace * stage for stage in range(num_stages)]
        turn = forward_pace * num_stages
        for lead in LEADS:
            backward = [turn + backward_pace * (num_stages - 1 - stage) - lead for stage in range(num_stages)]
            for patience in (0.0, 0.6):
                targets = Targets.periodic(forward, backward, backward, period_s, m, patience)
                listing = list_schedule(problem, targets, fused=True, lanes=lanes)
                if listing is not None and (found is None or listing.makespan_s < found.makespan_s - 1e-9):
                    found = listing
    assert found is not None
    return tuple(tuple(row) for row in found.ranks)
