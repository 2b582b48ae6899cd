"""Every other published order for the mesh that the search chose, each with its own cuts and recomputation.

The search itself compares meshes by the orders in SEARCHED, whose bounds it knows; what splits the backward or places
its chunks in a V then competes with the winner. An order must be faster by more than the cost model can tell apart.
Cuts are moved one by one under each order that could win. synthesized_schedule.py then makes orders for the winner.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...profiler.buffer_updates import update_scales
from ...schedules.published.library import SCHEDULES, SEARCHED
from ..memory.fewest import fewest_seconds
from ..memory.limits import fits
from ..memory.rank_bytes import quick_peaks
from ..space.candidates import Candidate
from ..stages.chain import NOTHING
from ..stages.cuts import improve_cuts
from .certificate import base_of
from .outcome import Outcome, is_preferable
from .scoring import score_alone
from .stage_recompute import recomputation
from .state import SearchState
from .step_time import lower_bound, step_seconds

MAX_SECONDS = 3.0
MAX_RIVALS, RIVAL_SECONDS = 4, 0.5  # other meshes, and the time for each
RIVAL = 0.95  # of the best step: bounds above that are not looked at
POLISH_SECONDS = 2.0
POLISH_MARGIN = 1.1  # cuts are moved under an order that takes at most so many times the best


@dataclass(frozen=True)
class Compared:
    """An outcome of the comparison. is_best: of all so far, by the comparison's measure. is_new: its candidate was not
    among those of the search."""

    outcome: Outcome
    is_best: bool = False
    is_new: bool = False


def compare_orders(state: SearchState, best: Outcome, least_gain: float) -> Iterator[Compared]:
    """Every other order. One is best where it is faster than the best before it by the factor least_gain, or faster
    and no larger.

    What is yielded must be recorded before the next is asked for: orders are scored against what is known by then.
    """
    if state.forced.schedule is not None or best.solution is None:
        return
    chosen, limit_s = best, (best.step_s or 0.0) / least_gain
    for base, seconds in _meshes(state, best.candidate):
        stop_at = min(time.monotonic() + seconds, state.deadline)
        bound_s = free_bound(state, base) if base.pp > 1 and time.monotonic() < stop_at else math.inf
        for candidate in _others(state, base):
            if bound_s >= limit_s or time.monotonic() > stop_at:
                break
            yield Compared(Outcome(candidate, bound_s=bound_s, search_bound_s=bound_s), is_new=True)
            outcome, is_best = score_alone(state, candidate), False
            if outcome.step_s is not None and outcome.step_s < limit_s * POLISH_MARGIN:
                outcome = polished(state, outcome)
                is_best = (outcome.step_s or 0.0) < limit_s or is_preferable(outcome, chosen)
                if is_best:
                    chosen, limit_s = outcome, min(limit_s, outcome.step_s or 0.0)
            yield Compared(outcome, is_best)


def _meshes(state: SearchState, best: Candidate) -> Iterator[tuple[Candidate, float]]:
    """The best plan's mesh and microbatch, then those on which another order could be faster still, those first whose
    published plans are fastest; seconds for each."""
    yield best, MAX_SECONDS
    step_s = state.incumbent.step_s if state.incumbent is not None else None
    rivals = [base for base, bound_s in state.any_order_s.items() if base.pp > 1 and bound_s < (step_s or 0.0) * RIVAL]
    rivals = [base for base in rivals if base != base_of(best)]
    found: dict[Candidate, float] = {}
    for candidate, outcome in state.outcomes.items():
        if outcome.step_s is not None:
            base = base_of(candidate)
            found[base] = min(found.get(base, math.inf), outcome.step_s)
    for base in sorted(rivals, key=lambda base: (found.get(base, math.inf), state.any_order_s[base]))[:MAX_RIVALS]:
        yield base, RIVAL_SECONDS


def polished(state: SearchState, outcome: Outcome) -> Outcome:
    """Single cuts moved while the simulated step falls, for a short while; each stage recomputes what it then must."""
    setting, candidate, solution = state.setting, outcome.candidate, outcome.solution
    if state.forced.cuts is not None or candidate.num_stages == 1 or solution is None:
        return outcome
    (ladder,) = state.ladders([solution])
    stop_at = min(time.monotonic() + POLISH_SECONDS, state.deadline)
    known = {outcome.bounds: outcome}

    def seconds(bounds: tuple[int, ...]) -> float:
        if bounds not in known:
            recompute = None
            if time.monotonic() < stop_at:
                recompute = recomputation(setting, candidate, ladder, bounds)
            if recompute is None:
                return float("inf")
            chain = setting.chain(solution, recompute)
            known[bounds] = replace(
                outcome,
                bounds=bounds,
                recompute=recompute,
                recompute_all=ladder.is_all(recompute),
                step_s=step_seconds(setting, candidate, chain, bounds),
                peak_bytes=int(quick_peaks(setting, candidate, chain, bounds).max()),
            )
        return known[bounds].step_s or 0.0

    return known[improve_cuts(outcome.bounds, seconds)]


def lowered(state: SearchState, outcome: Outcome) -> Outcome:
    """With the least recomputation, position by position, under its cuts; where that makes the step shorter."""
    setting, candidate, solution = state.setting, outcome.candidate, outcome.solution
    if solution is None or not outcome.recompute or time.monotonic() > state.deadline:
        return outcome
    (ladder,) = state.ladders([solution])
    recompute = fewest_seconds(setting, candidate, ladder, outcome.bounds, outcome.recompute)
    if recompute == outcome.recompute:
        return outcome
    chain = setting.chain(solution, recompute)
    if not fits(setting, candidate, chain, outcome.bounds):  # what several positions keep once may lie on another rank
        return outcome
    step_s = step_seconds(setting, candidate, chain, outcome.bounds)
    if step_s >= (outcome.step_s or 0.0):
        return outcome
    peak_bytes = int(quick_peaks(setting, candidate, chain, outcome.bounds).max())
    return replace(outcome, recompute=recompute, recompute_all=False, step_s=step_s, peak_bytes=peak_bytes)


def free_bound(state: SearchState, candidate: Candidate) -> float:
    """Seconds that no order, published or synthesized, goes below on the candidate's mesh and microbatch, whatever the
    cuts, the sharding and the recomputation."""
    solution = state.solve(candidate)
    if solution is None:
        return 0.0
    chain = state.setting.chain(solution, NOTHING)
    return lower_bound(state.setting, candidate, chain, any_order=True) * solution.proven_share


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
