"""The one interface to integer and linear solvers: PuLP builds the model, HiGHS solves it.

A time-out is never reported as an optimum: status comes from the solver's own model status, the bound from its dual
bound (PuLP's `status` says "Optimal" for an incumbent at the time limit; `sol_status` does not).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pulp


@dataclass(frozen=True)
class Solution:
    """status: optimal | feasible (limit reached with an answer) | infeasible | unknown.

    gap_fraction = (objective - bound) / objective.
    """

    status: str
    objective: float
    bound: float
    gap_fraction: float
    seconds: float


@contextlib.contextmanager
def no_native_output() -> Iterator[None]:
    """What a library's C code writes to this process's stdout is lost, and so is what Python writes meanwhile."""
    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing can be written
        yield
        return
    flush = ctypes.CDLL(None).fflush  # C keeps what it wrote in a buffer of its own
    nowhere = os.open(os.devnull, os.O_WRONLY)
    flush(None)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


class _Highs(pulp.HiGHS):  # type: ignore[misc]
    """Without the banner that its constructor prints, before any option can forbid it."""

    def createAndConfigureSolver(self, lp: pulp.LpProblem) -> None:
        with no_native_output():
            super().createAndConfigureSolver(lp)


def solve_model(
    model: pulp.LpProblem, *, time_limit_s: float | None = None, gap: float = 1e-9, threads: int = 1
) -> Solution:
    """Solve a minimization in place (variables get their values)."""
    started = time.perf_counter()
    solver = _Highs(msg=False, timeLimit=time_limit_s, gapRel=gap, threads=threads)
    model.solve(solver)
    seconds = time.perf_counter() - started
    found = model.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    if not found:
        infeasible = model.sol_status == pulp.LpSolutionInfeasible
        return Solution("infeasible" if infeasible else "unknown", float("inf"), float("-inf"), float("inf"), seconds)
    objective = float(pulp.value(model.objective) or 0.0)
    bound = _dual_bound(model, objective)
    status = "optimal" if objective - bound <= max(1e-6 * abs(objective), 1e-9) else "feasible"
    return Solution(status, objective, bound, max(0.0, objective - bound) / max(abs(objective), 1e-30), seconds)


def _dual_bound(model: pulp.LpProblem, objective: float) -> float:
    """What HiGHS proved: for an integer program its best bound, for a linear one the objective."""
    highs = getattr(model, "solverModel", None)
    if highs is None:
        return float("-inf")
    info = highs.getInfo()
    if not any(v.cat != pulp.LpContinuous for v in model.variables()):
        return objective if model.sol_status == pulp.LpSolutionOptimal else float("-inf")
    return float(info.mip_dual_bound)
