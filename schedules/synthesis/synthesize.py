"""Synthesis: the best order found for a pipeline's own times, microbatches, memory and placements, with a bound.

Anytime; the best of all placements is kept throughout:

    starts      published orders, building blocks repeated, lists, justified, as they run under the true times; of many
                microbatches first the steady state of orders for fewer
    annealing   the best start of each kind, then the best of these for longer
    proof       of small pipelines: an exact solver looks for anything shorter, or shows that there is none

Where activations may be let go (recomputed, offloaded) that is done for more memory than there is, too, and what it
finds is made to fit (recompute_offload_search.py).

A placement is left alone once its lower bound reaches the best makespan. Everything is drawn from one seed; how far a
search gets depends on time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..bounds import lower_bound
from ..graph import OrderGraph
from ..problem import PipelineProblem
from ..schedule import SYNTHESIZED, PipelineSchedule
from .exact import solve
from .pool import LONG_ACTIONS, Candidate, Starts, anneal_rounds, list_rounds, share_of, varied
from .recompute_offload_search import Bounded, search_sparing
from .steady_state import fewer_microbatches, offer_repeats

SHORT_ACTIONS = 30_000
DEFAULT_TIME_LIMITS_S = (7.0, 20.0)  # of short pipelines, of long ones
START_SHARES = (0.15, 0.35)  # of the time left, for starts: of short orders, of long ones
FEWER_SHARE = 0.4  # of the time, for fewer microbatches
ENDS_SHARE = 0.4  # of the time left, for the ends around the steady state
REPEATED_START_SHARE = 0.05  # of the time left, for starts other than those
EXACT_ACTIONS = 400  # up to which an exact solver gets a share of the time
EXACT_SHARE = 0.5
EXACT_LEAST_S = 0.6  # twice what it takes to begin


@dataclass(frozen=True)
class Synthesis:
    """name: where the best order is from. gap_fraction: of the makespan, to the best bound over all placements."""

    schedule: PipelineSchedule
    problem: PipelineProblem
    makespan_s: float
    bound_s: float
    gap_fraction: float
    name: str
    seconds: float


def synthesize(
    problems: Sequence[PipelineProblem], *, time_limit_s: float | None = None, seed: int = 0
) -> Synthesis | None:
    """problems: the same pipeline under each placement to choose from. None where none holds one microbatch, or no
    order was found that lets enough go."""
    began = time.monotonic()
    if time_limit_s is None:
        short = max(problem.num_actions for problem in problems) <= SHORT_ACTIONS
        time_limit_s = DEFAULT_TIME_LIMITS_S[0 if short else 1]
    deadline = began + time_limit_s
    bounded = [(problem, lower_bound(problem)) for problem in problems]
    bounded = [(problem, bound_s) for problem, bound_s in bounded if bound_s < float("inf")]
    if not bounded:
        return None
    small = max(problem.num_actions for problem, _ in bounded) <= EXACT_ACTIONS
    if any(problem.offers for problem, _ in bounded):
        found = search_sparing(bounded, lambda one, until: _search(one, until, seed) if one else [], deadline, seed)
        if not found:
            return None
    elif small and EXACT_SHARE * time_limit_s > EXACT_LEAST_S:
        found = _search(bounded, share_of(1 - EXACT_SHARE, deadline), seed)
        found, bounded = _proven(found, bounded, deadline, seed)
    else:
        found = _search(bounded, deadline, seed)
    best = found[0]
    bound_s = min(min(bound_s for _, bound_s in bounded), best.makespan_s)
    problem, ranks = best.graph.problem, tuple(map(tuple, best.graph.actions(best.order)))
    schedule = PipelineSchedule(best.name, problem.num_microbatches, problem.stage_rank, ranks)
    gap_fraction = (best.makespan_s - bound_s) / best.makespan_s if best.makespan_s else 0.0
    return Synthesis(schedule, problem, best.makespan_s, bound_s, gap_fraction, best.name, time.monotonic() - began)


def _search(bounded: Bounded, deadline: float, seed: int) -> list[Candidate]:
    """Best first."""
    searches = [Starts(problem, bound_s, seed) for problem, bound_s in bounded]
    share = START_SHARES[max(search.graph.num_nodes for search in searches) >= LONG_ACTIONS]
    least_s = min(bound_s for _, bound_s in bounded)
    if not any(search.least_s <= least_s * (1 + 1e-9) for search in searches):
        if fewer := fewer_microbatches(searches[0].graph.m, searches[0].graph.problem.num_ranks):
            problems = [replace(search.graph.problem, num_microbatches=fewer) for search in searches]
            shorter = _search([(one, lower_bound(one)) for one in problems], share_of(FEWER_SHARE, deadline), seed)
            offer_repeats(searches, shorter, share_of(ENDS_SHARE, deadline), seed)
            if any("repeated" in search.found for search in searches):
                share = REPEATED_START_SHARE
        for index, search in enumerate(searches):
            search.offer_lattices(share_of(share / (len(searches) - index), deadline))
    list_rounds(searches, share_of(share, deadline), random.Random(seed))
    return anneal_rounds(varied(searches), deadline, random.Random(seed))


def _proven(found: list[Candidate], bounded: Bounded, deadline: float, seed: int) -> tuple[list[Candidate], Bounded]:
    """With the bounds, and what is shorter, that an exact solver finds in the time left. Where there is no solver that
    time goes to annealing."""
    better: Bounded = []
    for index, (problem, bound_s) in enumerate(sorted(bounded, key=lambda item: item[1])):
        best_s, left_s = found[0].makespan_s, deadline - time.monotonic()
        if bound_s < best_s * (1 - 1e-9) and left_s > EXACT_LEAST_S:
            graph = OrderGraph(problem)
            own = next((candidate.order for candidate in found if candidate.graph.problem is problem), None)
            limit_s = max(EXACT_LEAST_S, left_s / (len(bounded) - index))
            solved = solve(graph, own, best_s, bound_s, time_limit_s=limit_s, seed=seed)
            if solved is None:
                return anneal_rounds(found, deadline, random.Random(seed)), bounded
            bound_s = solved.bound_s
            if solved.order is not None:
                found = [Candidate(graph, bound_s, solved.order, solved.makespan_s, SYNTHESIZED, "exact"), *found]
        better.append((problem, bound_s))
    return found, better
