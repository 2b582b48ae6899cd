"""Small pipelines to proven optimality, with CP-SAT of OR-Tools.

Each rank runs one action at a time, an action starts when what it waits for has arrived, and activations, held from the
start of F to the end of W, never exceed the rank's memory. Microbatches are alike, so each stage takes them in turn.
Asked is for an order shorter than one that is known: where there is none, that one is optimal.

CP-SAT counts in whole units. Where no unit divides all times, they are rounded down to a fine one: bounds stay valid,
and orders are taken at their true times.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..graph import Order, OrderGraph

FINEST = 1e-9  # of the largest value: below it a remainder is none
COARSE = 1e-4  # of the largest value: the least that counts as a common unit, and the unit where there is none
NUM_WORKERS = 8  # searches of different kinds, whatever the cores
GRACE_S = 10.0  # to end after the time limit


@dataclass(frozen=True)
class Solved:
    """order: shorter than the known one, None where none was found. bound_s: no order is shorter; the known makespan
    where it is proven optimal."""

    order: Order | None
    makespan_s: float
    bound_s: float


def solve(
    graph: OrderGraph, known: Order | None, known_s: float, bound_s: float, *, time_limit_s: float, seed: int = 0
) -> Solved | None:
    """known: a hint, where it is an order of this placement. known_s: makespan to beat. bound_s: a valid bound. None
    where OR-Tools does not run."""
    units, unit_s = _in_units(np.concatenate([graph.seconds, graph.lag]))
    seconds, lag = units[: graph.num_nodes], units[graph.num_nodes :]
    horizon = math.ceil(known_s / unit_s * (1 - 1e-9)) - 1  # what is shorter than known has no more units
    least = max(0, math.floor(bound_s / unit_s * (1 - 1e-9)))
    if least > horizon:
        return Solved(None, known_s, known_s)
    apart = [(one, node, seconds[one] + lag[node]) for node, one in enumerate(graph.before.tolist()) if one >= 0]
    apart += [(node - 1, node, seconds[node - 1]) for node in range(graph.num_nodes) if node % graph.m]
    ranks = [np.flatnonzero(graph.rank == rank).tolist() for rank in range(graph.problem.num_ranks)]
    answer = _asked(
        {
            "seconds": seconds,
            "apart": apart,  # (node, other): how long the other starts after it at least
            "ranks": [nodes for nodes in ranks if nodes],
            "memories": list(_memories(graph)),
            "least": least,
            "horizon": horizon,
            "hint": [] if known is None else [round(at / unit_s) for at in graph.starts(known).tolist()],
            "until_s": time.time() + time_limit_s,
            "num_workers": NUM_WORKERS,
            "seed": seed,
        },
        time_limit_s,
    )
    if answer is None:
        return None
    if answer["status"] == "INFEASIBLE":
        return Solved(None, known_s, known_s)
    proven_s = min(known_s, max(bound_s, math.ceil(answer["bound"] - 1e-6) * unit_s))
    if not answer["starts"]:
        return Solved(None, known_s, proven_s)
    order = graph.by_starts(np.array(answer["starts"]) + 0.5 * (np.array(seconds) > 0))  # what takes nothing first
    makespan_s = graph.makespan_s(order)
    if not graph.fits(order) or makespan_s >= known_s:
        return Solved(None, known_s, proven_s)
    return Solved(order, makespan_s, min(proven_s, makespan_s))


def _asked(job: dict[str, Any], time_limit_s: float) -> dict[str, Any] | None:
    """None where OR-Tools does not run."""
    if not sys.executable:
        return None
    command = [sys.executable, str(Path(__file__).with_name("cp_sat.py"))]
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, timeout=time_limit_s + GRACE_S
        )
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _memories(graph: OrderGraph) -> Iterator[dict[str, Any]]:
    """Of each rank that its limit holds back: the (F, W) between which something is held, sizes and limit in units."""
    problem, m = graph.problem, graph.m
    for rank, limit in enumerate(problem.memory_limit):
        own = problem.stages_of(rank)
        sizes = [float(problem.stages[stage].activation_bytes) for stage in own]
        if m * sum(sizes) <= limit:
            continue
        units, unit = _in_units(np.repeat(np.array(sizes), m))
        yield {
            "held": [(stage * m + i, (2 * graph.num_stages + stage) * m + i) for stage in own for i in range(m)],
            "sizes": units,
            "limit": int(limit / unit * (1 + 1e-9)),
        }


def _in_units(values: np.ndarray) -> tuple[list[int], float]:
    """Whole multiples of a unit, rounded down where none fits all."""
    unit = common_unit(values.tolist())
    if unit is not None:
        units = np.rint(values / unit)
        if (np.abs(units * unit - values) <= FINEST * values).all():
            return units.astype(int).tolist(), unit
    unit = COARSE * float(values.max())
    return np.floor(values / unit).astype(int).tolist(), unit


def common_unit(values: Sequence[float]) -> float | None:
    """The largest that all values are whole multiples of; None where it would be below COARSE of the largest."""
    largest = max(values)
    if largest <= 0.0:
        return 1.0
    unit = largest
    for value in set(values):
        while value > FINEST * largest:  # Euclid's algorithm
            unit, value = value, abs(math.remainder(unit, value))
        if unit < COARSE * largest:
            return None
    return unit
