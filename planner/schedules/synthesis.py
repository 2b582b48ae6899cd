"""Synthesis: the best order found for a pipeline's own times, microbatches, memory and placements, with a bound.

Anytime, in two steps; the best of all placements is kept throughout:

    starts      published orders, building blocks repeated, lists, justified, as they run under the true times
    annealing   the best start of each kind, then the best of these for longer

A placement is left alone once its lower bound reaches the best makespan. Everything is drawn from one seed; how far a
search gets depends on time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .base import PipelineSchedule
from .bounds import lower_bound
from .local_search import anneal
from .order_graph import Order, OrderGraph
from .problem import PipelineProblem
from .starts import ListSearch, library_orders

SHORT_ACTIONS = 30_000
DEFAULT_TIME_LIMITS_S = (7.0, 20.0)  # of short pipelines, of long ones
START_SHARES = (0.15, 0.35)  # of the time, at most, for starts: of short orders, of long ones
PATIENCE = 0.35  # lists end after this share of their time without gain
KEPT = 4  # starts of a placement and kind
# candidates annealed, share of the time left; long orders take all of it to cool down once
ROUNDS = ((10, 0.25), (4, 0.35), (2, 0.4), (1, 0.5), (1, 1.0))
LONG_ROUNDS = ((4, 0.4), (1, 1.0))
LONG_ACTIONS = 1500
NAME = "synthesized"
TEMPERATURES = (0.1, 0.2, 0.4, 0.8)  # of a mean action
KIND_MARGIN = 1.1  # the best of a kind is left alone beyond this times the best of all
AS_BEFORE = 0.7  # chance of the temperature that a candidate comes from


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


@dataclass(frozen=True, eq=False)
class Candidate:
    """kind: what it was built by."""

    graph: OrderGraph
    bound_s: float
    order: Order
    makespan_s: float
    name: str
    kind: str
    temperature: float = 0.0  # that it was annealed from, in mean actions


def synthesize(
    problems: Sequence[PipelineProblem], *, time_limit_s: float | None = None, seed: int = 0
) -> Synthesis | None:
    """problems: the same pipeline under each placement to choose from. None where none holds one microbatch."""
    began = time.monotonic()
    if time_limit_s is None:
        short = max(3 * problem.num_stages * problem.num_microbatches for problem in problems) <= SHORT_ACTIONS
        time_limit_s = DEFAULT_TIME_LIMITS_S[0 if short else 1]
    deadline = began + time_limit_s
    bounded = [(problem, lower_bound(problem)) for problem in problems]
    bounded = [(problem, bound_s) for problem, bound_s in bounded if bound_s < float("inf")]
    if not bounded:
        return None
    searches = [_Search(problem, bound_s, seed) for problem, bound_s in bounded]
    long = max(search.graph.num_nodes for search in searches) >= LONG_ACTIONS
    until = began + START_SHARES[long] * time_limit_s
    if not any(search.least_s <= min(bound_s for _, bound_s in bounded) * (1 + 1e-9) for search in searches):
        for search in searches:
            search.offer_lattices(until)
    _list_rounds(searches, until, random.Random(seed))
    best = _anneal_rounds(_varied(searches), deadline, random.Random(seed))
    bound_s = min(min(bound_s for _, bound_s in bounded), best.makespan_s)
    problem, ranks = best.graph.problem, tuple(map(tuple, best.graph.actions(best.order)))
    schedule = PipelineSchedule(best.name, problem.num_microbatches, problem.stage_rank, ranks)
    gap_fraction = (best.makespan_s - bound_s) / best.makespan_s if best.makespan_s else 0.0
    return Synthesis(schedule, problem, best.makespan_s, bound_s, gap_fraction, best.name, time.monotonic() - began)


class _Search:
    """Starts of one placement."""

    def __init__(self, problem: PipelineProblem, bound_s: float, seed: int) -> None:
        self.graph, self.bound_s = OrderGraph(problem), bound_s
        self.lists = ListSearch(self.graph, seed)
        self.found: dict[str, list[Candidate]] = {}  # by kind, best first
        for name, order in library_orders(self.graph):
            self.offer("library", name, order, self.graph.makespan_s(order))

    def offer_lattices(self, deadline: float) -> None:
        for order, makespan_s in self.lists.lattice_orders(deadline):
            self.offer("lattice", "lattice", order, makespan_s)

    def offer(self, kind: str, name: str, order: Order, makespan_s: float) -> None:
        same = self.found.setdefault(kind, [])
        if all(abs(makespan_s - candidate.makespan_s) > 1e-9 * makespan_s for candidate in same):
            same.append(Candidate(self.graph, self.bound_s, order, makespan_s, name, kind))
            same.sort(key=lambda candidate: candidate.makespan_s)
            del same[KEPT:]

    def step(self) -> None:
        listed = self.lists.step()
        if listed is not None:
            kind, order, makespan_s = listed
            self.offer(kind, "list", order, makespan_s)

    @property
    def least_s(self) -> float:
        return min((same[0].makespan_s for same in self.found.values()), default=float("inf"))


def _list_rounds(searches: list[_Search], deadline: float, rng: random.Random) -> None:
    """Placements that do well get more lists. Ends early where one is as short as can be."""
    least_s = min(search.least_s for search in searches)
    for search in searches:
        while search.lists.plain and search.bound_s < least_s * (1 - 1e-9):
            if search.found and time.monotonic() > deadline:
                break
            search.step()
            least_s = min(least_s, search.least_s)
    gained = now = time.monotonic()
    patience_s = PATIENCE * (deadline - now)
    while (now := time.monotonic()) < min(deadline, gained + patience_s):
        if (shortest_s := min(search.least_s for search in searches)) < least_s:
            least_s, gained = shortest_s, now
        open_searches = [search for search in searches if search.bound_s < least_s * (1 - 1e-9)]
        if not open_searches:
            break
        weights = [(least_s / search.least_s) ** 8 + 0.02 for search in open_searches]
        rng.choices(open_searches, weights)[0].step()


def _varied(searches: list[_Search]) -> list[Candidate]:
    """Best first; then the best of each other kind, as orders of one kind lead to the same; then the others."""
    found = _ranked(candidate for search in searches for same in search.found.values() for candidate in same)
    leaders: dict[str, Candidate] = {}
    for candidate in found:
        leaders.setdefault(candidate.kind, candidate)
    first = [c for c in leaders.values() if c.makespan_s < KIND_MARGIN * found[0].makespan_s]
    return first + [candidate for candidate in found if candidate not in first]


def _anneal_rounds(candidates: list[Candidate], deadline: float, rng: random.Random) -> Candidate:
    long = candidates[0].graph.num_nodes >= LONG_ACTIONS
    for count, share in LONG_ROUNDS if long else ROUNDS:
        chosen = candidates[:count]
        until = time.monotonic() + share * (deadline - time.monotonic())
        for index, candidate in enumerate(chosen):
            best_s = min(c.makespan_s for c in candidates)
            left = until - time.monotonic()
            if left <= 0 or candidate.bound_s >= best_s * (1 - 1e-9):
                continue
            problem = candidate.graph.problem
            mean_s = sum(problem.work_s) / (3 * problem.num_stages)
            temperature = candidate.temperature if rng.random() < AS_BEFORE else 0.0
            temperature = temperature or rng.choice(TEMPERATURES)
            order, makespan_s = anneal(
                candidate.graph,
                candidate.order,
                time_limit_s=left / (len(chosen) - index),
                seed=rng.randrange(1, 2**31),
                hottest_s=mean_s * temperature,
                bound_s=candidate.bound_s,
            )
            order, makespan_s = candidate.graph.justified(order) or (order, makespan_s)
            if makespan_s < candidate.makespan_s * (1 - 1e-12):
                candidates.append(
                    Candidate(candidate.graph, candidate.bound_s, order, makespan_s, NAME, candidate.kind, temperature)
                )
        candidates = _ranked(candidates)
    return candidates[0]


def _ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Best first, without those as long as another of the same placement."""
    kept: dict[tuple, Candidate] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.makespan_s):
        kept.setdefault((candidate.graph.problem.stage_rank, round(candidate.makespan_s, 9)), candidate)
    return list(kept.values())
