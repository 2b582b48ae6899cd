"""What a search keeps: orders of each placement, by what they were built by, and their improvement.

Placements that do well get more lists; the best order of each kind is annealed, then longer the best of these.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..graph import Order, OrderGraph
from ..problem import PipelineProblem
from ..schedule import SYNTHESIZED
from .annealing import anneal
from .initial_orders import ListSearch, library_orders

PATIENCE = 0.35  # lists end after this share of their time without gain
KEPT = 8  # starts of a placement and kind
LONG_ACTIONS = 1_500
# from how many actions on: candidates annealed, share of the time left; long orders take all of it to cool down once
ROUNDS = {
    0: ((10, 0.25), (4, 0.35), (2, 0.4), (1, 0.5), (1, 1.0)),
    LONG_ACTIONS: ((16, 0.6), (4, 0.6), (1, 1.0)),
    12_000: ((4, 0.4), (1, 1.0)),
}
TEMPERATURES = (0.1, 0.2, 0.4, 0.8)  # of a mean action
KIND_MARGIN = 1.1  # the best of a kind is left alone beyond this times the best of all
OTHERS_MARGIN = 1.3  # and any other beyond this
AS_BEFORE = 0.7  # chance of the temperature that a candidate comes from
INFINITE = float("inf")


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


class Starts:
    """Starts of one placement."""

    def __init__(self, problem: PipelineProblem, bound_s: float, seed: int) -> None:
        self.graph, self.bound_s = OrderGraph(problem), bound_s
        self.lists = ListSearch(self.graph, seed)
        self.found: dict[str, list[Candidate]] = {}  # by kind, best first
        for name, order in library_orders(self.graph):
            self.offer("library", order, self.graph.makespan_s(order), name)

    def offer_lattices(self, deadline: float) -> None:
        for kind, order, makespan_s in self.lists.lattice_orders(deadline):
            self.offer(kind, order, makespan_s)

    def offer(self, kind: str, order: Order, makespan_s: float, name: str = SYNTHESIZED) -> None:
        """Kept where it can finish and is among the best of its kind, each makespan once."""
        if makespan_s == INFINITE:
            return
        same = self.found.setdefault(kind, [])
        if all(abs(makespan_s - candidate.makespan_s) > 1e-9 * makespan_s for candidate in same):
            same.append(Candidate(self.graph, self.bound_s, order, makespan_s, name, kind))
            same.sort(key=lambda candidate: candidate.makespan_s)
            del same[KEPT:]

    def step(self) -> None:
        listed = self.lists.step()
        if listed is not None:
            kind, order, makespan_s = listed
            self.offer(kind, order, makespan_s)

    @property
    def least_s(self) -> float:
        return min((same[0].makespan_s for same in self.found.values()), default=INFINITE)


def list_rounds(searches: list[Starts], deadline: float, rng: random.Random) -> None:
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


def varied(searches: list[Starts]) -> list[Candidate]:
    """Best first; then the best of each other kind, as orders of one kind lead to the same; then the others."""
    found = _ranked(candidate for search in searches for same in search.found.values() for candidate in same)
    leaders: dict[str, Candidate] = {}
    for candidate in found:
        leaders.setdefault(candidate.kind, candidate)
    first = [c for c in leaders.values() if c.makespan_s < KIND_MARGIN * found[0].makespan_s]
    others = [c for c in found if c not in first and c.makespan_s < OTHERS_MARGIN * found[0].makespan_s]
    return first + others


def anneal_rounds(candidates: list[Candidate], deadline: float, rng: random.Random) -> list[Candidate]:
    size = sum(map(len, candidates[0].order))
    for count, share in ROUNDS[max(least for least in ROUNDS if least <= size)]:
        chosen = candidates[:count]
        until = share_of(share, deadline)
        for index, candidate in enumerate(chosen):
            best_s = min(c.makespan_s for c in candidates)
            if time.monotonic() >= until or candidate.bound_s >= best_s * (1 - 1e-9):
                continue
            found = annealed(candidate, share_of(1 / (len(chosen) - index), until), rng)
            order, makespan_s = found.graph.justified(found.order) or (found.order, found.makespan_s)
            if makespan_s < candidate.makespan_s * (1 - 1e-12):
                candidates.append(replace(found, order=order, makespan_s=makespan_s))
        candidates = _ranked(candidates)
    return candidates


def annealed(candidate: Candidate, until: float, rng: random.Random, frozen: Sequence[range] = ()) -> Candidate:
    problem = candidate.graph.problem
    mean_s = sum(problem.work_s) / (3 * problem.num_stages)
    temperature = candidate.temperature if rng.random() < AS_BEFORE else 0.0
    temperature = temperature or rng.choice(TEMPERATURES)
    order, makespan_s = anneal(
        candidate.graph,
        candidate.order,
        time_limit_s=max(0.0, until - time.monotonic()),
        seed=rng.randrange(1, 2**31),
        hottest_s=mean_s * temperature,
        bound_s=candidate.bound_s,
        frozen=frozen,
    )
    return replace(candidate, order=order, makespan_s=makespan_s, name=SYNTHESIZED, temperature=temperature)


def _ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Best first, without those as long as another of the same placement and kind."""
    kept: dict[tuple, Candidate] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.makespan_s):
        key = (candidate.graph.problem.stage_rank, candidate.kind, round(candidate.makespan_s, 9))
        kept.setdefault(key, candidate)
    return list(kept.values())


def share_of(share: float, deadline: float) -> float:
    """When this share of the time left is over."""
    now = time.monotonic()
    return now + share * max(0.0, deadline - now)
