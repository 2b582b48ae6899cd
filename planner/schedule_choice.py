"""Every other published order for the mesh that the search chose, each with its own cuts and recomputation.

The search itself compares meshes by the orders in SEARCHED, whose bounds it knows; what splits the backward or places
its chunks in a V then competes with the winner. An order must be faster by more than the cost model can tell apart.
Cuts are moved one by one under each order that could win. Last, an order is synthesized for the winner's own stages,
where their bound leaves as much to gain, and cuts and order are improved in turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..costmodel.simulator import Timeline
from ..profiler.buffer_updates import update_scales
from .candidates import Candidate
from .chain import Chain
from .evaluate import hops, lower_bound, run_timeline, stage_times, step_seconds
from .footprint import activation_room, fits, placement_of, placements_of, quick_peaks
from .outcome import Outcome
from .schedules import PipelineSchedule
from .schedules.base import SYNTHESIZED
from .schedules.bounds import lower_bound as bound_of
from .schedules.library import SCHEDULES, SEARCHED
from .schedules.problem import PipelineProblem
from .schedules.synthesis import synthesize
from .setting import Setting
from .stages import improve_cuts

if TYPE_CHECKING:
    from .search import SearchState

MAX_SECONDS = 3.0
SYNTHESIS_SECONDS = 3.0
LEAST_SECONDS = 0.5  # for an order that is asked for, whatever the time limit
SYNTHESIS_SHARES = (0.5, 0.7, 1.0)  # of the time left, of one order after the other
POLISH_SECONDS = 2.0
POLISH_MARGIN = 1.1  # cuts are moved under an order that takes at most so many times the best
MAX_ACTIONS = 12_000  # of an order that is synthesized without being asked for


def best_order(state: SearchState, best: Outcome, least_gain: float) -> Outcome:
    """The best outcome over all orders, its cuts polished; `best` unless another is faster by the factor least_gain."""
    best = state.incumbent = _polished(state, best)  # what Ctrl-C leaves
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
        if outcome.step_s is not None and outcome.step_s < limit_s * POLISH_MARGIN:
            outcome = state.outcomes[candidate] = _polished(state, outcome)
            if (outcome.step_s or 0.0) < limit_s:
                chosen, limit_s = outcome, outcome.step_s or 0.0
                state.incumbent = chosen
    return chosen


def _polished(state: SearchState, outcome: Outcome) -> Outcome:
    """Single cuts moved while the simulated step falls, for a short while."""
    setting, candidate = state.setting, outcome.candidate
    if state.forced.cuts is not None or candidate.num_stages == 1 or outcome.solution is None:
        return outcome
    chain = setting.chain(outcome.solution, outcome.recompute)
    stop_at = min(time.monotonic() + POLISH_SECONDS, state.deadline)

    def seconds(bounds: tuple[int, ...]) -> float:
        if bounds != outcome.bounds and (time.monotonic() > stop_at or not fits(setting, candidate, chain, bounds)):
            return float("inf")
        return step_seconds(setting, candidate, chain, bounds)

    bounds = improve_cuts(outcome.bounds, seconds)
    if bounds == outcome.bounds:
        return outcome
    peak_bytes = int(quick_peaks(setting, candidate, chain, bounds).max())
    return replace(
        outcome, bounds=bounds, step_s=step_seconds(setting, candidate, chain, bounds), peak_bytes=peak_bytes
    )


def free_bound(state: SearchState, candidate: Candidate) -> float:
    """Seconds that no order, published or synthesized, goes below on the candidate's mesh and microbatch, whatever the
    cuts, the sharding and the recomputation."""
    solution = state.solve(candidate)
    if solution is None:
        return 0.0
    chain = state.setting.chain(solution, ())
    return lower_bound(state.setting, candidate, chain, any_order=True) * solution.proven_share


@dataclass(frozen=True)
class OwnOrder:
    """candidate: with a schedule of the order's placement. timeline: with the bytes held."""

    candidate: Candidate
    schedule: PipelineSchedule
    timeline: Timeline
    bounds: tuple[int, ...]


def own_order(state: SearchState, best: Outcome, published: Timeline, least_gain: float) -> OwnOrder | None:
    """An order synthesized for the best plan's stages, on the placement and with the cuts that suit it; None where it
    is not faster than the published one by the factor least_gain, or, where asked for, where there is none."""
    setting, asked = state.setting, state.forced.synthesize
    if best.candidate.pp == 1 or best.solution is None or (state.forced.schedule is not None and not asked):
        return None
    if len(placements_of(best.candidate)) > 1:
        return None
    chain, bounds = setting.chain(best.solution, best.recompute), best.bounds
    placed = list(_placements(best.candidate))
    problems = [_problem(setting, candidate, chain, bounds) for candidate in placed]
    after_s = published.makespan_s - published.compute_makespan_s
    limit_s = published.makespan_s / least_gain
    if not asked and (problems[0].num_actions > MAX_ACTIONS or after_s + min(map(bound_of, problems)) > limit_s):
        return None
    stop_at = min(time.monotonic() + SYNTHESIS_SECONDS, state.deadline)
    found: OwnOrder | None = None
    for share in SYNTHESIS_SHARES:
        left_s = share * (stop_at - time.monotonic())
        if asked and found is None:
            left_s = max(left_s, LEAST_SECONDS)
        synthesis = synthesize(problems, time_limit_s=left_s) if left_s > 0 else None
        if synthesis is None:
            break
        schedule, before = replace(synthesis.schedule, name=SYNTHESIZED), bounds
        candidate = next(one for one in placed if placement_of(one) == schedule.stage_rank)
        bounds = _cuts_under(state, candidate, chain, bounds, schedule, stop_at)
        timeline = run_timeline(setting, candidate, chain, bounds, schedule=schedule, with_memory=True)
        if found is not None and timeline.makespan_s >= found.timeline.makespan_s:
            break
        found = OwnOrder(candidate, schedule, timeline, bounds)
        if bounds == before:
            break
        placed, problems = [candidate], [_problem(setting, candidate, chain, bounds)]
    return found if found is not None and (asked or found.timeline.makespan_s <= limit_s) else None


def _placements(candidate: Candidate) -> Iterator[Candidate]:
    """Its own, then the others that its number of chunks allows: the loop and the V."""
    chunks, seen = candidate.virtual_stages, set()
    names = [name for name in ("interleaved_1f1b", "zb_v", "hanayo") if chunks > 1 and chunks in SCHEDULES[name].chunks]
    for one in (candidate, *(replace(candidate, schedule=name) for name in names)):
        if placement_of(one) not in seen:
            seen.add(placement_of(one))
            yield one


def _problem(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> PipelineProblem:
    rooms = [activation_room(setting, candidate, chain, bounds, rank) for rank in range(candidate.pp)]
    stages, transfers = stage_times(setting, candidate, chain, bounds), hops(setting, candidate, chain, bounds)
    return PipelineProblem(candidate.count, placement_of(candidate), tuple(stages), tuple(transfers), tuple(rooms))


def _cuts_under(
    state: SearchState,
    candidate: Candidate,
    chain: Chain,
    bounds: tuple[int, ...],
    schedule: PipelineSchedule,
    stop_at: float,
) -> tuple[int, ...]:
    """Single cuts moved while the step under this order falls, within what its activations leave room for."""
    if state.forced.cuts is not None:
        return bounds
    setting = state.setting

    def seconds(trial: tuple[int, ...]) -> float:
        if trial != bounds and time.monotonic() > stop_at:
            return float("inf")
        timeline = run_timeline(setting, candidate, chain, trial, schedule=schedule, with_memory=True)
        rooms = (activation_room(setting, candidate, chain, trial, rank) for rank in range(candidate.pp))
        fit = all(held <= room for held, room in zip(timeline.peak_bytes, rooms, strict=True))
        return timeline.makespan_s if fit else float("inf")

    return improve_cuts(bounds, seconds)


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
        own = best.virtual_stages if best.virtual_stages > 1 and best.virtual_stages in chunks else chunks[0]
        wanted = state.forced.virtual_stages or own
        if wanted in chunks and (wanted > 1 or chunks[0] == 1) and best.pp * wanted <= num_instances:
            if state.forced.cuts is None or len(state.forced.cuts) + 1 == best.pp * wanted:
                yield replace(best, schedule=name, virtual_stages=wanted)
