"""What it costs to train within less activation memory: kept, all recomputed, or let go one by one.

    python benchmarks/sparing.py [--seconds 7] [-o results/sparing.md]

Pipelines of equal stages, in the units of `shardwright schedule`: F = I = W = 1 of a rank's share of the model, up to
two chunks on a rank. "all recomputed" is the usual way: every backward runs its forward first, so that I takes 2 and
nothing but inputs, counted as nothing, is held; "one by one" lets the order choose. Offloading a share's activations
takes 0.5 or 2 each way, beside compute. All makespans are the simulator's, of the best order found.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from shardwright.schedules.placements import placed
from shardwright.schedules.problem import problem_of_shares
from shardwright.schedules.schedule import loop_placement
from shardwright.schedules.synthesis.synthesize import synthesize

PIPELINES = ((8, 16), (8, 64))
MEMORIES = (6.0, 4.0, 3.0, 2.0, 1.5, 1.0)
UNIFORM = (1.0, 1.0, 1.0)
INFINITE = float("inf")
WAYS = {
    "kept": {},
    "one by one": {"recompute": True},
    "offload 2": {"offload_s": 2.0},
    "offload 0.5": {"offload_s": 0.5},
    "both, 2": {"recompute": True, "offload_s": 2.0},
}


def best(p: int, m: int, times: tuple[float, float, float], memory: float, seconds: float, **offer: object) -> str:
    problems = [
        candidate
        for chunks in (1, 2)
        for candidate in placed(
            problem_of_shares(m, loop_placement(p, chunks), times, memory_limit=memory, **offer)  # type: ignore[arg-type]
        )
    ]
    found = synthesize(problems, time_limit_s=seconds)
    return "" if found is None else f"{found.makespan_s:g}"


def rows(p: int, m: int, seconds: float) -> list[str]:
    forward_s, input_s, weight_s = UNIFORM
    again = best(p, m, (forward_s, forward_s + input_s, weight_s), INFINITE, seconds)
    found = ["| memory | all recomputed | " + " | ".join(WAYS) + " |", "| --- " * (2 + len(WAYS)) + "|"]
    for memory in MEMORIES:
        cells = [best(p, m, UNIFORM, memory, seconds, **offer) for offer in WAYS.values()]
        found.append(f"| {memory:g} | {again} | " + " | ".join(cells) + " |")
    return found


def page(lines: Sequence[str], seconds: float) -> str:
    made = (
        f"Made by `python benchmarks/sparing.py` on {date.today()}: Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, {seconds:g} s an order. F = I = W = 1, at most two chunks on a rank, memory in "
        "microbatches of a rank's share; offloading a share takes so long each way."
    )
    return "\n".join(["# Within less memory", "", made, "", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=7.0)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    lines: list[str] = []
    for p, m in PIPELINES:
        lines += [f"## {p} ranks, {m} microbatches", "", *rows(p, m, asked.seconds), ""]
        print("\n".join(lines[-len(MEMORIES) - 5 :]), flush=True)
    if asked.output:
        asked.output.write_text(page(lines, asked.seconds))


if __name__ == "__main__":
    main()
