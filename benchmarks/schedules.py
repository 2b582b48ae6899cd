"""How good are synthesized schedules? Against the best of published generators and proven optima, by an outside judge.

    python benchmarks/schedules.py --judge judge.py --cells best_known.csv [--exact exact.csv] [--results FILE.jsonl]
                                   [--time-limit S] [--only TEXT,...] [--sample N] [--again] [--write]

--cells: a row for each pipeline (ranks p, microbatches m, profile of times, memory limit) with the best known makespan
and a lower bound; the placement of up to two chunks on each rank is free. --exact: rows with a placement and the
makespan of an exact solver. The judge, a module with PROFILES, make_times, from_json, validate and simulate, counts
makespan and memory. Rows are kept in --results and not run again, but for those that were worse, with --again. --only:
rows whose name contains one of the texts. --write puts the tables in benchmarks/results/schedules.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from shardwright.schedules.placements import placed
from shardwright.schedules.problem import PipelineProblem, problem_of_shares
from shardwright.schedules.schedule import loop_placement, v_placement
from shardwright.schedules.synthesis.synthesize import synthesize

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "schedules.md"
TOLERANCE = 1e-6
BELOW_1F1B = ("vmin", "p/2+1")  # limits below the p microbatches of 1F1B
SHAPES = {"loop": loop_placement, "V": v_placement}


def cells(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as lines:
        for row in csv.DictReader(lines):
            yield {
                "name": f"{row['p']}x{row['m']} {row['profile']} {row['cap']}",
                "p": int(row["p"]),
                "m": int(row["m"]),
                "profile": row["profile"],
                "limit": row["cap"],
                "memory": float(row["mem_cap"] or "inf"),
                "known": float(row["makespan"]),
                "bound": float(row["lb_cell"]),
            }


def exact_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as lines:
        for row in csv.DictReader(lines):
            yield {
                "name": f"{row['p']}x{row['m']} {row['profile']} {row['mem']} {row['placement']}{row['v']}",
                "p": int(row["p"]),
                "m": int(row["m"]),
                "profile": row["profile"],
                "limit": row["status"],
                "memory": float(row["mem"]),
                "known": float(row["makespan"]),
                "bound": float(row["cp_bound"]),
                "place": SHAPES[row["placement"]](int(row["p"]), int(row["v"])),
            }


def problems_of(row: dict[str, Any], profile: dict[str, Any]) -> list[PipelineProblem]:
    """Under each placement that the row allows."""
    p = row["p"]
    places = [row["place"]] if "place" in row else [loop_placement(p, 1), loop_placement(p, 2)]
    problems = [
        problem_of_shares(
            row["m"],
            place,
            (profile["F"], profile["I"], profile["W"]),
            profile["C"],
            stage_extra=(profile.get("first", 0.0), profile.get("last", 0.0)),
            memory_limit=row["memory"],
        )
        for place in places
    ]
    return problems if "place" in row else [found for problem in problems for found in placed(problem)]


def run(row: dict[str, Any], judge: ModuleType, time_limit_s: float | None, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    found = synthesize(problems_of(row, judge.PROFILES[row["profile"]]), time_limit_s=time_limit_s, seed=seed)
    wall_s = time.perf_counter() - began
    if found is None:
        raise SystemExit(f"{row['name']}: no order found")
    theirs = judge.from_json(found.schedule.to_judge())
    judge.validate(theirs)
    judged = judge.simulate(theirs, judge.make_times(row["profile"], theirs.p, theirs.v))
    if judged["peak_mem"] > row["memory"] + TOLERANCE:
        raise SystemExit(f"{row['name']}: {judged['peak_mem']:g} microbatches held, the limit is {row['memory']:g}")
    return {"makespan": judged["makespan"], "by": found.name, "chunks": theirs.v, "seconds": wall_s, **row}


def verdict(row: dict[str, Any]) -> str:
    if row["makespan"] > row["known"] + TOLERANCE:
        return "worse"
    return "better" if row["makespan"] < row["known"] - TOLERANCE else "equal"


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown: verdicts and mean gaps by limit and profile, then every row that is worse."""
    lines = ["| limit | profile | rows | worse | equal | better | mean gap | of the best known |", "| --- " * 8 + "|"]
    classes = {
        "vmin, p/2+1": [row for row in rows if row["limit"] in BELOW_1F1B],
        "1p or more": [row for row in rows if row["limit"] not in BELOW_1F1B and "place" not in row],
        "proven optimal": [row for row in rows if row["limit"] == "OPTIMAL"],
        "best of an exact solver": [row for row in rows if row["limit"] == "FEASIBLE"],
    }
    for name, members in classes.items():
        profiles = sorted({row["profile"] for row in members})
        for profile in [*profiles, "all"] if members else []:
            chosen = [row for row in members if profile in (row["profile"], "all")]
            counts = [sum(verdict(row) == word for row in chosen) for word in ("worse", "equal", "better")]
            gap, known = (
                sum(row[key] / row["bound"] - 1 for row in chosen) / len(chosen) for key in ("makespan", "known")
            )
            lines.append(
                f"| {name} | {profile} | {len(chosen)} | {' | '.join(map(str, counts))} | {gap:.2%} | {known:.2%} |"
            )
    worse = [row for row in rows if verdict(row) == "worse"]
    lines += ["", f"Worse than the best known: {len(worse)} rows.", ""]
    if worse:
        lines += ["| row | makespan | best known | more |", "| --- " * 4 + "|"]
    for row in sorted(worse, key=lambda row: -row["makespan"] / row["known"]):
        more = row["makespan"] / row["known"] - 1
        lines.append(f"| {row['name']} | {row['makespan']:.4g} | {row['known']:.4g} | {more:.2%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--cells", type=Path)
    parser.add_argument("--exact", type=Path)
    parser.add_argument("--results", type=Path, help="JSON lines, read and appended to")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="of each row (default: synthesis's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="texts with commas between")
    parser.add_argument("--sample", type=int, metavar="N", help="so many rows, drawn at random")
    parser.add_argument("--again", action="store_true", help="run rows that were worse again; the better result stays")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    sys.path.insert(1, str(ROOT / "tests"))
    from outside_judge import load_judge

    judge = load_judge(args.judge)
    rows = [*(cells(args.cells) if args.cells else ()), *(exact_rows(args.exact) if args.exact else ())]
    rows = [row for row in rows if any(text in row["name"] for text in args.only.split(","))]
    if args.sample:
        rows = random.Random(args.seed).sample(rows, min(args.sample, len(rows)))
    done: dict[str, dict[str, Any]] = {}
    for line in args.results.read_text().splitlines() if args.results and args.results.exists() else ():
        kept = json.loads(line)
        if kept["name"] not in done or kept["makespan"] < done[kept["name"]]["makespan"]:
            done[kept["name"]] = kept
    for row in rows:
        before = done.get(row["name"])
        if before is not None and not (args.again and verdict(before) == "worse"):
            continue
        found = run(row, judge, args.time_limit, args.seed)
        if args.results:
            with args.results.open("a") as lines:
                print(json.dumps(found), file=lines)
        print(
            f"{row['name']}: {found['makespan']:.4f}, best known {row['known']:.4f}, {verdict(found)}; gap "
            f"{found['makespan'] / row['bound'] - 1:.2%}, {found['by']}, {found['seconds']:.1f} s",
            flush=True,
        )
        if before is None or found["makespan"] < before["makespan"]:
            done[row["name"]] = found
    table = report([done[row["name"]] for row in rows])
    print(table)
    if args.write:
        limit = "its own time limit" if args.time_limit is None else f"{args.time_limit:g} s"
        RESULTS.write_text(
            f"# Synthesized schedules\n\n`benchmarks/schedules.py` on {datetime.date.today()}: Python "
            f"{platform.python_version()}, one core, {limit} a row.\n\n{table}\n"
        )


if __name__ == "__main__":
    main()
