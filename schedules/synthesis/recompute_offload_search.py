"""Orders that let activations go, for pipelines that offer it.

Orders are searched for several times the memory there is, made to fit by recompute_offload.py, and annealed beside
those that keep everything. What anneals well is stripped and made to fit again: in its new order less may have to go.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator

from ..bounds import lower_bound
from ..graph import OrderGraph
from ..problem import PipelineProblem
from ..schedule import SYNTHESIZED
from .pool import Candidate, anneal_rounds, share_of
from .recompute_offload import SparedGraph, Sparing, spared_order, without_sparing

Bounded = list[tuple[PipelineProblem, float]]  # with their bounds
Search = Callable[[Bounded, float], list[Candidate]]  # until when; best first

KEEPING_SHARE = 0.3  # of the time, for orders that keep everything
MEMORY_SHARES = (4 / 3, 1.5, 2.0, float("inf"))  # of the limits
SEARCH_SHARE = 0.5  # of the time left, for all of these
FIT_SHARE = 0.1  # of the time left, for fitting what was annealed again
TRIED = 10  # orders of each, made to fit
COMPUTED = (Sparing(), Sparing(weights_first=False))  # again, all that is let go
COPIED = (Sparing(1.0, 0), Sparing(1.0, 1), Sparing(1.0, 2), Sparing(0.7, 1))  # as far as the link goes
ALL_COPIED = (Sparing(float("inf"), 0, computes=False), Sparing(float("inf"), 1, computes=False))
ROUNDS = ((12, 0.3), (6, 0.4), (3, 0.5), (1, 1.0))  # candidates annealed, share of the time left
MARGIN = 1e-9


def search_sparing(bounded: Bounded, search: Search, deadline: float, seed: int) -> list[Candidate]:
    """Best first. Empty where nothing was found. search: for orders that keep everything."""
    bound_of = {problem.stage_rank: (problem, bound_s) for problem, bound_s in bounded}
    found = search(_bounded(bounded, 1.0), share_of(KEEPING_SHARE, deadline))
    least_s = min(bound_s for _, bound_s in bounded)
    if found and found[0].makespan_s <= least_s * (1 + MARGIN):
        return found
    until = share_of(SEARCH_SHARE, deadline)
    for index, share in enumerate(MEMORY_SHARES):
        loose = search(_bounded(bounded, share), share_of(1 / (len(MEMORY_SHARES) - index), until))
        found += _fitted(loose[:TRIED], bound_of, until)
    rng = random.Random(seed)
    for count, share in ROUNDS:
        if not found:
            break
        found = _apart(found)
        found = anneal_rounds(found[:count], share_of(share, deadline), rng) + found[count:]
        found += _fitted(found[:count], bound_of, share_of(FIT_SHARE, deadline))
        found.sort(key=lambda candidate: candidate.makespan_s)
        if time.monotonic() > deadline:
            break
    return found


def _bounded(bounded: Bounded, share: float) -> Bounded:
    problems = [problem.keeping_all(share) for problem, _ in bounded]
    kept = [(problem, lower_bound(problem)) for problem in problems]
    return [(problem, bound_s) for problem, bound_s in kept if bound_s < float("inf")]


def _fitted(
    loose: Iterable[Candidate], bound_of: dict[tuple[int, ...], tuple[PipelineProblem, float]], until: float
) -> Iterator[Candidate]:
    """As many as until then, and the first."""
    for index, candidate in enumerate(loose):
        if index and time.monotonic() > until:
            return
        problem, bound_s = bound_of[candidate.graph.problem.stage_rank]
        base, order = OrderGraph(problem), candidate.order
        if isinstance(candidate.graph, SparedGraph):
            order = base.of_actions(without_sparing(candidate.graph.actions(order)))
        copies = any(stage.offload_bytes for stage in problem.stages)
        computes = any(stage.recompute_bytes for stage in problem.stages)
        ways = (COPIED + ALL_COPIED if copies else ()) + (COMPUTED if computes else ())
        for way in ways:
            spared = spared_order(problem, base, order, way)
            if spared is not None:
                graph, own = spared
                yield Candidate(graph, bound_s, own, graph.makespan_s(own), SYNTHESIZED, "spared")


def _apart(found: list[Candidate]) -> list[Candidate]:
    """Best first, each makespan once."""
    kept = {round(candidate.makespan_s, 9): candidate for candidate in reversed(found)}
    return sorted(kept.values(), key=lambda candidate: candidate.makespan_s)
