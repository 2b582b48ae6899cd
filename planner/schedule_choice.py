"""Every other published order for the mesh that the search chose, each with its own cuts and recomputation.

The search itself compares meshes by the orders in SEARCHED, whose bounds it knows; what splits the backward or places
its chunks in a V then competes with the winner. An order must be faster by more than the cost model can tell apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..profiler.buffer_updates import update_scales
from .candidates import Candidate
from .evaluate import lower_bound
from .outcome import Outcome
from .schedules.library import SCHEDULES, SEARCHED

if TYPE_CHECKING:
    from .search import SearchState

MAX_SECONDS = 3.0


def best_order(state: SearchState, best: Outcome, least_gain: float) -> Outcome:
    """The best outcome over all orders; `best` unless another is faster by the factor least_gain."""
    if best.candidate.pp == 1 or state.forced.schedule is not None or best.solution is None:
        return best
    stop_at = time.monotonic() + MAX_SECONDS
    chain = state.setting.chain(best.solution, best.recompute)
    chosen, limit_s = best, (best.step_s or 0.0) / least_gain
    for candidate in _others(state, best.candidate):
        if time.monotonic() > stop_at:
            break
        bound_s = lower_bound(state.setting, candidate, chain)
        if bound_s >= limit_s:
            continue
        state.candidates.append(candidate)
        state.outcomes[candidate] = Outcome(candidate, bound_s=bound_s, search_bound_s=bound_s)
        outcome = state.outcomes[candidate] = state.score_alone(candidate)
        if outcome.step_s is not None and outcome.step_s < limit_s:
            chosen, limit_s = outcome, outcome.step_s
    return chosen


def _others(state: SearchState, best: Candidate) -> Iterator[Candidate]:
    """Those that split the backward first: they leave the smallest bubbles. Two directions need written buffers whose
    updates can be joined."""
    num_instances = len(state.setting.shape.instances)
    written = [segment for segment in state.setting.graph.segments.values() if segment.mutated_buffers]
    directions = 1 if any(None in update_scales(segment).values() for segment in written) else 2
    names = [name for name in SCHEDULES if name not in SEARCHED and SCHEDULES[name].directions <= directions]
    for name in sorted(names, key=lambda n: not SCHEDULES[n].splits_backward):
        chunks = SCHEDULES[name].chunks
        wanted = state.forced.virtual_stages or (best.virtual_stages if best.virtual_stages in chunks else chunks[0])
        if wanted in chunks and best.pp * wanted <= num_instances:
            if state.forced.cuts is None or len(state.forced.cuts) + 1 == best.pp * wanted:
                yield replace(best, schedule=name, virtual_stages=wanted)
