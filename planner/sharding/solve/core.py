"""The core of a placement problem: what the reductions leave and tables over all of it would not hold.

    relaxation       the integer program below with y in [0, 1], by HiGHS through PuLP; its optimum is a bound
    rounding         a variable whose option the relaxation decides takes it; the others are solved exactly by tables
    neighbourhoods   where that is not near yet: around undecided variables the widest region that tables hold is
                     solved again, the rest held
    integer program  where the answer is further than NEAR from the bound, or the core is small

    y[u,i]   in {0,1}  u takes option i               one per variable: sum_i y[u,i] = 1           (_choose_one)
    e[uv,ij] >= 0      u takes i and v takes j        sum_j e[uv,ij] = y[u,i]                      (_link)
                                                      sum_i e[uv,ij] = y[v,j]                      (_link)
    objective          sum cost_u[i] y[u,i] + sum cost_uv[i,j] e[uv,ij]

Pairs of infinite cost have no e. The linear relaxation of this form is tight on trees.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pulp

from ...solver import Solution, solve_model
from .bucket import MAX_WORK, Factor, eliminate, plan_order

NEAR = 0.01  # of the answer: a gap that is left as it is, in a large core
LARGE_OPTIONS = 3000
MAX_REGIONS = 100
REGION_ENTRIES = 1 << 20  # of a region's tables
DECIDED = 1 - 1e-6
MAX_SWEEPS = 50
FORBIDDEN = 1e12  # in place of infinity: the least bad option where all are forbidden


@dataclass
class Core:
    """costs: by variable. neighbours[u][v][i, j]: of u at i and v at j, in both directions."""

    costs: dict[int, np.ndarray]
    neighbours: dict[int, dict[int, np.ndarray]]

    @property
    def num_options(self) -> int:
        return sum(map(len, self.costs.values()))

    def edges(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each once, by the smaller variable."""
        return ((u, v, m) for u, row in self.neighbours.items() for v, m in row.items() if u < v)

    def objective(self, picked: dict[int, int]) -> float:
        total = sum(float(costs[picked[u]]) for u, costs in self.costs.items())
        return total + sum(float(m[picked[u], picked[v]]) for u, v, m in self.edges())

    def given(self, u: int, picked: dict[int, int], held: Collection[int]) -> np.ndarray:
        """Costs of u's options, its neighbours in held as picked."""
        return sum((m[:, picked[v]] for v, m in self.neighbours[u].items() if v in held), self.costs[u])


def solve_by_tables(core: Core) -> dict[int, int] | None:
    """The best options; None where the tables would be too large."""
    return _resolve(core, {}, set(core.costs))


def solve_core(core: Core, time_limit_s: float | None) -> tuple[str, float, dict[int, int]]:
    """(status, bound, options): optimal, feasible, infeasible, or unknown where the time was too short."""
    began = time.perf_counter()
    program = _Program(core)
    relaxed = program.solve(time_limit_s, integer=False)
    if relaxed.status == "infeasible":
        return "infeasible", float("inf"), {}
    if relaxed.status == "optimal":
        picked, bound = _rounded(core, program.shares(), relaxed.bound), relaxed.bound
    else:
        picked, bound = _descend(core, dict.fromkeys(core.costs, 0)), _least_of_each(core)
    found_s = core.objective(picked)
    if found_s <= bound + 1e-9 * abs(bound):
        return "optimal", bound, picked
    if core.num_options > LARGE_OPTIONS and found_s - bound <= NEAR * abs(found_s):
        return "feasible", bound, picked
    left_s = None if time_limit_s is None else max(1.0, time_limit_s - (time.perf_counter() - began))
    exact = program.solve(left_s, integer=True)
    if exact.status == "infeasible":
        return "infeasible", float("inf"), {}
    if exact.status in ("optimal", "feasible"):
        bound = max(bound, exact.bound)
        chosen = {u: int(np.argmax(shares)) for u, shares in program.shares().items()}
        if exact.status == "optimal" or core.objective(chosen) < found_s:
            return exact.status, bound, chosen
    return ("feasible" if np.isfinite(found_s) else "unknown"), bound, picked


class _Program:
    """The integer program over a core, and its relaxation."""

    def __init__(self, core: Core) -> None:
        self.core, self.scale = core, _scale(core)
        self.model = pulp.LpProblem("sharding", pulp.LpMinimize)
        self.terms: list[tuple[pulp.LpVariable, float]] = []
        self.pick = {u: self._choose_one(u, costs) for u, costs in core.costs.items()}
        for u, v, matrix in core.edges():
            self._link(u, v, matrix)
        self.model += pulp.lpSum(cost * variable for variable, cost in self.terms if cost)

    def solve(self, time_limit_s: float | None, *, integer: bool) -> Solution:
        for options in self.pick.values():
            for variable in options.values():
                variable.cat = pulp.LpInteger if integer else pulp.LpContinuous
        found = solve_model(self.model, time_limit_s=time_limit_s)
        return Solution(
            found.status, found.objective * self.scale, found.bound * self.scale, found.gap_fraction, found.seconds
        )

    def shares(self) -> dict[int, np.ndarray]:
        """Of each variable's options, in the last answer."""
        found = {u: np.zeros(len(costs)) for u, costs in self.core.costs.items()}
        for u, options in self.pick.items():
            for i, variable in options.items():
                found[u][i] = variable.value() or 0.0
        return found

    def _choose_one(self, u: int, costs: np.ndarray) -> dict[int, pulp.LpVariable]:
        variables = {}
        for i, cost in enumerate(costs):
            if np.isfinite(cost):
                variables[i] = pulp.LpVariable(f"y_{u}_{i}", lowBound=0, upBound=1)
                self.terms.append((variables[i], float(cost) / self.scale))
        self.model += pulp.lpSum(variables.values()) == 1
        return variables

    def _link(self, u: int, v: int, matrix: np.ndarray) -> None:
        rows: dict[int, list[pulp.LpVariable]] = {i: [] for i in self.pick[u]}
        columns: dict[int, list[pulp.LpVariable]] = {j: [] for j in self.pick[v]}
        for i in rows:
            for j in columns:
                if np.isfinite(matrix[i, j]):
                    both = pulp.LpVariable(f"e_{u}_{v}_{i}_{j}", lowBound=0)
                    rows[i].append(both)
                    columns[j].append(both)
                    self.terms.append((both, float(matrix[i, j]) / self.scale))
        for i, members in rows.items():
            self.model += pulp.lpSum(members) == self.pick[u][i]
        for j, members in columns.items():
            self.model += pulp.lpSum(members) == self.pick[v][j]


def _rounded(core: Core, shares: dict[int, np.ndarray], bound: float) -> dict[int, int]:
    picked = {u: int(np.argmax(row)) for u, row in shares.items()}
    open_variables = sorted(u for u, row in shares.items() if row.max() < DECIDED)
    whole = _resolve(core, picked, set(open_variables))
    picked = _descend(core, whole or picked)
    if core.objective(picked) - bound <= NEAR / 4 * abs(bound):
        return picked
    for u in open_variables[:: -(-len(open_variables) // MAX_REGIONS) or 1]:
        region: set[int] = {u}
        while True:
            wider = region.union(*(core.neighbours[v] for v in region))
            better = _resolve(core, picked, wider, REGION_ENTRIES) if wider != region else None
            if better is None:
                break
            region, picked = wider, better
    return picked


def _resolve(core: Core, picked: dict[int, int], free: set[int], most: int = MAX_WORK) -> dict[int, int] | None:
    """The best options of free variables, the others held; None where the tables would be too large."""
    sizes = {u: len(core.costs[u]) for u in free}
    order = plan_order(sizes, {u: [v for v in core.neighbours[u] if v in free] for u in free}, most)
    if order is None:
        return None
    held = core.costs.keys() - free
    factors = [Factor((u,), core.given(u, picked, held)) for u in sorted(free)]
    factors += [Factor((u, v), m) for u in sorted(free) for v, m in core.neighbours[u].items() if u < v and v in free]
    return {**picked, **eliminate(order, factors)[1]}


def _descend(core: Core, picked: dict[int, int]) -> dict[int, int]:
    """The best option of one variable after the other, given the others, until none gains."""
    picked = dict(picked)
    for _ in range(MAX_SWEEPS):
        before = dict(picked)
        for u in core.costs:
            costs = core.given(u, picked, core.costs)
            picked[u] = int(np.argmin(np.nan_to_num(costs, posinf=FORBIDDEN)))
        if picked == before:
            break
    return picked


def _least_of_each(core: Core) -> float:
    """A bound: every table at its least entry."""
    tables = [*core.costs.values(), *(matrix for _, _, matrix in core.edges())]
    return sum(float(table.min()) for table in tables)


def _scale(core: Core) -> float:
    """Costs are microseconds to seconds; the solver's tolerances expect numbers near one."""
    tables = [*core.costs.values(), *(matrix for _, _, matrix in core.edges())]
    finite = [float(np.abs(c[np.isfinite(c)]).max(initial=0.0)) for c in tables]
    return max([*finite, 1e-12]) / 1000.0
