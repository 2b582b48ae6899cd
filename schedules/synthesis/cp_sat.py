"""OR-Tools' CP-SAT in a process of its own: exact.py runs this file, the model as JSON on stdin, the answer on stdout.

OR-Tools and highspy each bring a libhighs.so.1, and a process that has loaded the one cannot load the other.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """job: see exact.py. status: of CP-SAT. bound: in units. starts: of all nodes, where there are any."""
    from ortools.sat.python import cp_model

    model, seconds, horizon = cp_model.CpModel(), job["seconds"], job["horizon"]
    start = [model.new_int_var(0, horizon, "") for _ in seconds]
    makespan = model.new_int_var(job["least"], horizon, "")
    for one, other, apart in job["apart"]:
        model.add(start[other] >= start[one] + apart)
    for nodes in job["ranks"]:
        model.add_no_overlap([model.new_fixed_size_interval_var(start[n], seconds[n], "") for n in nodes])
        for node in nodes:
            model.add(makespan >= start[node] + seconds[node])
    for memory in job["memories"]:
        held = [
            model.new_interval_var(start[first], model.new_int_var(0, horizon, ""), start[last] + seconds[last], "")
            for first, last in memory["held"]
        ]
        model.add_cumulative(held, memory["sizes"], memory["limit"])
    model.minimize(makespan)
    for node, at in enumerate(job["hint"]):
        model.add_hint(start[node], at)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(0.0, job["until_s"] - time.time())
    solver.parameters.num_workers = job["num_workers"]
    solver.parameters.random_seed = job["seed"]
    status = solver.solve(model)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return {
        "status": solver.status_name(status),
        "bound": solver.best_objective_bound,
        "starts": [solver.value(at) for at in start] if found else [],
    }


if __name__ == "__main__":
    here = str(Path(__file__).parent)
    sys.path = [path for path in sys.path if path != here]  # this folder's modules have names of their own
    print(json.dumps(solve(json.load(sys.stdin))))
