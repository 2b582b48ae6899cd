"""Every other published order for the mesh that the search chose, each with its own cuts and recomputation.

The search itself compares meshes by the orders in SEARCHED, whose bounds it knows; what splits the backward or places
its chunks in a V then competes with the winner. An order must be faster by more than the cost model can tell apart.
Last, an order is synthesized for the winner's own stages, where their bound leaves as much to gain.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..costmodel.simulator import Timeline
from ..profiler.buffer_updates import update_scales
from .candidates import Candidate
from .evaluate import hops, lower_bound, run_timeline, stage_times
from .footprint import activation_room, placement_of, placements_of
from .order import SYNTHESIZED
from .outcome import Outcome
from .schedules import PipelineSchedule
from .schedules.bounds import lower_bound as bound_of
from .schedules.library import SCHEDULES, SEARCHED
from .schedules.problem import PipelineProblem
from .schedules.synthesis import synthesize

if TYPE_CHECKING:
    from .search import SearchState

MAX_SECONDS = 3.0
SYNTHESIS_SECONDS = 3.0
MAX_ACTIONS = 12_000  # of an order that is synthesized without being asked for


def best_order(state: SearchState, best: Outcome, least_gain: float) -> Outcome:
    """The best outcome over all orders; `best` unless another is faster by the factor least_gain."""
    if best.candidate.pp == 1 or state.forced.schedule is not None or best.solution is None:
        return best
    stop_at = min(time.monotonic() + MAX_SECONDS, state.deadline)
    bound_s = free_bound(state, best.candidate)
    chosen, limit_s = best, (best.step_s or 0.0) / least_gain
    for candidate in _others(state, best.candidate):
        if bound_s >= limit_s or time.monotonic() > stop_at:
            break
        state.candidates.append(candidate)
        state.outcomes[candidate] = Outcome(candidate, bound_s=bound_s, search_bound_s=bound_s)
        outcome = state.outcomes[candidate] = state.score_alone(candidate)
        if outcome.step_s is not None and outcome.step_s < limit_s:
            chosen, limit_s = outcome, outcome.step_s
    return chosen


def free_bound(state: SearchState, candidate: Candidate) -> float:
    """Seconds that no order, published or synthesized, goes below on the candidate's mesh and microbatch, whatever the
    cuts, the sharding and the recomputation."""
    solution = state.solve(candidate)
    if solution is None:
        return 0.0
    chain = state.setting.chain(solution, ())
    return lower_bound(state.setting, candidate, chain, any_order=True) * solution.proven_share


def own_order(
    state: SearchState, best: Outcome, bounds: tuple[int, ...], published: Timeline, least_gain: float
) -> tuple[PipelineSchedule, Timeline] | None:
    """An order synthesized for these stages; None where it is not faster than the published one by the factor
    least_gain, or, where asked for, where there is none. The timeline knows the bytes."""
    setting, candidate = state.setting, best.candidate
    asked = state.forced.synthesize
    if candidate.pp == 1 or best.solution is None or (state.forced.schedule is not None and not asked):
        return None
    if len(placements_of(candidate)) > 1:
        return None
    chain = setting.chain(best.solution, best.recompute)
    rooms = [activation_room(setting, candidate, chain, bounds, rank) for rank in range(candidate.pp)]
    stages, transfers = stage_times(setting, candidate, chain, bounds), hops(setting, candidate, chain, bounds)
    problem = PipelineProblem(candidate.count, placement_of(candidate), tuple(stages), tuple(transfers), tuple(rooms))
    after_s = published.makespan_s - published.compute_makespan_s
    limit_s = published.makespan_s / least_gain
    if not asked and (problem.num_actions > MAX_ACTIONS or after_s + bound_of(problem) > limit_s):
        return None
    left_s = min(SYNTHESIS_SECONDS, state.deadline - time.monotonic())
    found = synthesize([problem], time_limit_s=left_s) if left_s > 0 else None
    if found is None:
        return None
    schedule = replace(found.schedule, name=SYNTHESIZED)
    timeline = run_timeline(setting, candidate, chain, bounds, schedule=schedule, with_memory=True)
    return (schedule, timeline) if asked or timeline.makespan_s <= limit_s else None


def _others(state: SearchState, best: Candidate) -> Iterator[Candidate]:
    """Those that split the backward first: they leave the smallest bubbles. Two directions need written buffers whose
    updates can be joined. Orders are synthesized for one direction alone."""
    num_instances = len(state.setting.shape.instances)
    written = [segment for segment in state.setting.graph.segments.values() if segment.mutated_buffers]
    joined = all(None not in update_scales(segment).values() for segment in written)
    directions = 2 if joined and not state.forced.synthesize else 1
    names = [name for name in SCHEDULES if name not in SEARCHED and SCHEDULES[name].directions <= directions]
    for name in sorted(names, key=lambda n: not SCHEDULES[n].splits_backward):
        chunks = SCHEDULES[name].chunks
        wanted = state.forced.virtual_stages or (best.virtual_stages if best.virtual_stages in chunks else chunks[0])
        if wanted in chunks and best.pp * wanted <= num_instances:
            if state.forced.cuts is None or len(state.forced.cuts) + 1 == best.pp * wanted:
                yield replace(best, schedule=name, virtual_stages=wanted)
