"""Choose one option for each variable so that the sum of unary and pairwise costs is least, with a proof.

    minimize   sum_u cost_u[x_u]  +  sum_(u,v) cost_uv[x_u, x_v]

This is a partitioned Boolean quadratic problem (Scholz and Eckstein 2002, "Register allocation for irregular
architectures", section 3). Two exact reductions alternate until neither applies:
    elimination   a variable with at most two neighbours is folded into them: its best answer for each of their states
                  (their rules R0, RI and RII)                                                   (_eliminate)
    dominance     an option goes when another of the same variable is no worse whatever the neighbours take: in cost
                  plus the largest difference on each edge                                       (_prune)
What is left is eliminated by tables over more than two variables where these stay small (bucket.py); else core.py has
it. The bound that is proven is handed back with the answer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ...solver import Solution
from .core import Core, solve_by_tables, solve_core

Price = float | Sequence[float]  # of one unit of weight, or of each of several


@dataclass
class Problem:
    """costs: one vector for each variable. edges: matrices, rows by the smaller variable's options. weights: of some
    variables' options, in one or several other units (a column each) that prices may turn into costs (priced).
    """

    costs: list[np.ndarray] = field(default_factory=list)
    weights: dict[int, np.ndarray] = field(default_factory=dict)
    edges: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    labels: list[Hashable] = field(default_factory=list)

    def add_variable(self, costs: np.ndarray, label: Hashable = None) -> int:
        self.costs.append(np.asarray(costs, dtype=float))
        self.labels.append(label)
        return len(self.costs) - 1

    def add_edge(self, u: int, v: int, matrix: np.ndarray) -> None:
        """matrix[i, j]: cost of u at i and v at j. Edges between the same two variables add up."""
        if u == v:
            self.costs[u] = self.costs[u] + np.diagonal(matrix)
            return
        if u > v:
            u, v, matrix = v, u, matrix.T
        known = self.edges.get((u, v))
        self.edges[(u, v)] = matrix.astype(float) if known is None else known + matrix

    def add_weight(self, u: int, weight: np.ndarray) -> None:
        self.weights[u] = self.weights[u] + weight if u in self.weights else weight

    def objective(self, choice: list[int], price: Price = 0.0) -> float:
        total = sum(float(c[i]) for c, i in zip(self.costs, choice, strict=True))
        total += sum(float(m[choice[u], choice[v]]) for (u, v), m in self.edges.items())
        return total + sum(float(_at(w[choice[u]][None], price)[0]) for u, w in self.weights.items())


def _at(weights: np.ndarray, price: Price) -> np.ndarray:
    """Costs of options with these weights. One price is that of every unit."""
    return np.dot(weights, np.broadcast_to(price, weights.shape[1:]))


def prepare(problem: Problem) -> Elimination:
    """The reductions that hold at every price: what solves of the same problem at several prices have in common."""
    work = Elimination(problem)
    work.run()
    return work


def solve(
    problem: Problem, time_limit_s: float | None = None, *, price: Price = 0.0, prepared: Elimination | None = None
) -> tuple[list[int], Solution]:
    """The best option for each variable with the weights at this price added to the costs, and what is proven of it.

    prepared: of the same problem. Where there is no answer (status infeasible, or unknown at the time limit) the
    objective is infinite and the options mean nothing.
    """
    started = time.perf_counter()
    work = (prepared or Elimination(problem)).priced(price)
    work.run()
    core = work.core()
    status, bound = "optimal", 0.0
    choice = [-1] * len(problem.costs)
    picked = solve_by_tables(core)
    proven = picked is not None
    if picked is None:
        status, bound, picked = solve_core(core, time_limit_s)
    for u, option in picked.items():
        choice[u] = int(work.options[u][option])
    if status in ("optimal", "feasible"):
        work.back_substitute(choice)
        objective = problem.objective(choice, price)
        if objective == float("inf"):
            status = "infeasible"
    if status in ("infeasible", "unknown"):  # unknown: the time limit came before a first answer
        bound = float("inf") if status == "infeasible" else float("-inf")
        gap = 0.0 if status == "infeasible" else float("inf")
        return choice, Solution(status, float("inf"), bound, gap, time.perf_counter() - started)
    bound = objective if proven else min(objective, bound + work.constant)
    gap = 0.0 if objective <= bound else (objective - bound) / max(abs(objective), 1e-30)
    return choice, Solution(status, objective, bound, gap, time.perf_counter() - started)


class _Compared(NamedTuple):
    """possible: rows of the matrix that are not all infinite; None: all. worst[j, i]: row j in place of row i costs at
    most this much more, whatever the column."""

    matrix: np.ndarray
    possible: np.ndarray | None
    worst: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray) -> _Compared:
        difference = matrix[:, None, :] - matrix
        worst = np.maximum.reduce(difference, axis=2)
        if np.maximum.reduce(matrix, axis=None) < np.inf:
            return cls(matrix, None, worst)
        difference[np.isnan(difference)] = -np.inf  # impossible with either
        return cls(matrix, np.isfinite(matrix).any(axis=1), np.maximum.reduce(difference, axis=2))


def _undominated(costs: np.ndarray, weights: np.ndarray | None, worst_of: list[np.ndarray]) -> np.ndarray | None:
    """Positions of options that no other beats whatever the neighbours take, in costs and, where they are not in the
    costs yet, in weights; of two equal ones the first. None: all. worst_of: of each neighbour, _Compared.worst."""
    worst = costs[:, None] - costs  # [j, i]: option j in place of i, at most this much dearer
    for table in worst_of:
        worst = worst + table
    beaten = worst <= 0
    if np.count_nonzero(beaten) <= np.count_nonzero(beaten.diagonal()):
        return None
    if weights is not None:
        no_more = weights[:, None] <= weights[None, :]
        beaten &= no_more if weights.ndim == 1 else no_more.all(axis=2)
    np.fill_diagonal(beaten, False)
    # of options that beat each other, the first stays
    beaten &= ~(beaten.T & np.tri(len(costs), k=-1, dtype=bool))
    alive = np.ones(len(costs), dtype=bool)
    for i in np.flatnonzero(beaten.any(axis=0))[::-1]:  # one at a time: what beats an option must itself be there
        if (beaten[:, i] & alive).any():
            alive[i] = False
    return np.flatnonzero(alive)


class Elimination:
    """The exact reductions, with what is needed to recover the options of the variables that they removed."""

    def __init__(self, problem: Problem) -> None:
        self.costs = list(problem.costs)
        self.weights = dict(problem.weights)  # not priced yet: these variables stay
        self.options = [np.arange(len(c)) for c in problem.costs]  # original numbers of the options still there
        self.neighbours: list[dict[int, np.ndarray]] = [{} for _ in problem.costs]
        for (u, v), matrix in problem.edges.items():
            self.neighbours[u][v] = matrix
            self.neighbours[v][u] = matrix.T
        self.alive = set(range(len(problem.costs)))
        self.constant = 0.0
        self.stack: list[tuple[int, list[int], np.ndarray, list[np.ndarray]]] = []
        self._compared: dict[tuple[int, int], _Compared] = {}

    def priced(self, price: Price) -> Elimination:
        """A copy with the weights at this price in the costs. Arrays are shared, since none is ever written to."""
        other = copy.copy(self)
        other.costs = [c + _at(self.weights[u], price) if u in self.weights else c for u, c in enumerate(self.costs)]
        other.weights = {}
        other.options, other.stack, other.alive = list(self.options), list(self.stack), set(self.alive)
        other.neighbours = [dict(row) for row in self.neighbours]
        other._compared = dict(self._compared)
        return other

    def run(self) -> None:
        with np.errstate(invalid="ignore"):  # inf - inf
            self._run()

    def _run(self) -> None:
        queue = sorted(self.alive, key=lambda u: len(self.neighbours[u]))
        pending = set(queue)
        while queue:
            u = queue.pop()
            pending.discard(u)
            if u not in self.alive:
                continue
            pruned = self._prune(u)
            touched = list(self.neighbours[u])
            priced = u not in self.weights
            if priced and len(touched) <= 2:
                self._eliminate(u, touched)
            elif priced and len(self.costs[u]) == 1:
                self._fix(u, touched)
            elif not pruned:
                continue
            for v in touched:
                if v not in pending:
                    queue.append(v)
                    pending.add(v)

    def _prune(self, u: int) -> bool:
        """Remove impossible and dominated options; of two equal ones the first stays."""
        costs, weights = self.costs[u], self.weights.get(u)
        if len(costs) == 1:
            return False
        edges = [self._compare(u, v) for v in self.neighbours[u]]
        kept = self._possible(costs, edges)
        if kept is None:
            kept = _undominated(costs, weights, [edge.worst for edge in edges])
            if kept is None:
                return False
        else:
            among = np.ix_(kept, kept)
            weights = None if weights is None else weights[kept]
            best = _undominated(costs[kept], weights, [edge.worst[among] for edge in edges])
            kept = kept if best is None else kept[best]
        if len(kept) == len(costs):
            return False
        self.costs[u], self.options[u] = costs[kept], self.options[u][kept]
        if u in self.weights:
            self.weights[u] = self.weights[u][kept]
        for (v, matrix), edge in zip(list(self.neighbours[u].items()), edges, strict=True):
            self.neighbours[u][v] = matrix = matrix[kept]
            self.neighbours[v][u] = matrix.T
            possible = None if edge.possible is None else edge.possible[kept]
            self._compared[u, v] = _Compared(matrix, possible, edge.worst[np.ix_(kept, kept)])
        return True

    @staticmethod
    def _possible(costs: np.ndarray, edges: list[_Compared]) -> np.ndarray | None:
        """Options of finite cost, whatever the neighbours must take for that. None: all."""
        keep = np.isfinite(costs)
        for edge in edges:
            if edge.possible is not None:
                keep &= edge.possible
        if np.count_nonzero(keep) == len(costs):
            return None
        if not keep.any():
            keep[0] = True  # infeasible: leave one option, whose infinite cost shows it
        return np.flatnonzero(keep)

    def _compare(self, u: int, v: int) -> _Compared:
        """Options of u by what they cost at v; found anew only where the edge has changed."""
        matrix, known = self.neighbours[u][v], self._compared.get((u, v))
        if known is None or known.matrix is not matrix:
            known = self._compared[u, v] = _Compared.of(matrix)
        return known

    def _fix(self, u: int, touched: list[int]) -> None:
        """A variable with one option left is a cost of each neighbour."""
        self.alive.discard(u)
        self.stack.append((u, [], np.array(0), [self.options[u]]))
        self.constant += float(self.costs[u][0])
        for v in touched:
            self.costs[v] = self.costs[v] + self.neighbours[u][v][0]
            del self.neighbours[v][u]
        self.neighbours[u] = {}

    def _eliminate(self, u: int, touched: list[int]) -> None:
        self.alive.discard(u)
        if not touched:
            self.stack.append((u, [], np.array(int(np.argmin(self.costs[u]))), [self.options[u]]))
            self.constant += float(self.costs[u].min())
            return
        if len(touched) == 1:
            (v,) = touched
            total = self.costs[u][:, None] + self.neighbours[u][v]
            self.stack.append((u, [v], total.argmin(axis=0), [self.options[u], self.options[v]]))
            self.costs[v] = self.costs[v] + total.min(axis=0)
            del self.neighbours[v][u]
            return
        v, w = touched
        total = self.costs[u][:, None, None] + self.neighbours[u][v][:, :, None] + self.neighbours[u][w][:, None, :]
        self.stack.append((u, [v, w], total.argmin(axis=0), [self.options[u], self.options[v], self.options[w]]))
        merged = total.min(axis=0)
        del self.neighbours[v][u], self.neighbours[w][u]
        known = self.neighbours[v].get(w)
        merged = merged if known is None else merged + known
        self.neighbours[v][w], self.neighbours[w][v] = merged, merged.T

    def core(self) -> Core:
        alive = sorted(self.alive)
        return Core({u: self.costs[u] for u in alive}, {u: self.neighbours[u] for u in alive})

    def back_substitute(self, choice: list[int]) -> None:
        """choice holds original option numbers; a removed variable's table is over the options left at that time."""
        for u, others, table, options in reversed(self.stack):
            states = tuple(int(np.searchsorted(known, choice[v])) for v, known in zip(others, options[1:], strict=True))
            choice[u] = int(options[0][int(table[states])])
