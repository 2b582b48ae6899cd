"""How well the planner predicts published training runs, through the path that `shardwright plan` takes.

    python benchmarks/published.py --data FOLDER              table by source
    python benchmarks/published.py --data FOLDER --worst 20   and the rows predicted worst
    ... --only SOURCE     files whose names begin so
    ... --sample N        at most N rows of a source, evenly spaced (0: all)
    ... --json PATH       every row with its prediction
    ... --write           docs/validation.md and benchmarks/results/published.md

Each row's model is captured as a transformers configuration of its sizes, its layout is forced, and the search's own
evaluation gives step time and memory (published_path.py). FOLDER holds CSV files of published runs, which are not part
of the repository.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from published_path import PlannerPath, Prediction, capture_key
from published_rows import Row, read_rows
from published_statistics import Judged
from published_tables import tables, worst
from published_validation import PAGE, write

DEFAULT_SAMPLE = 120  # of a source: all sources within ten minutes on two cores
MOST_CAPTURES = 8  # of a source that is sampled
SMALL = 40  # rows: such a source is not sampled
_PATH: list[PlannerPath] = []  # of this worker process


def sampled(rows: Iterable[Row], most: int) -> list[Row]:
    """At most so many of each source that can be predicted, evenly spaced in its file, of MOST_CAPTURES models; and all
    that cannot. Small sources are there whole."""
    by_source: dict[str, list[Row]] = defaultdict(list)
    left_out = []
    for row in rows:
        (left_out if row.left_out else by_source[row.source]).append(row)
    kept: list[Row] = []
    for here in by_source.values():
        if most and len(here) > SMALL:
            keys = set(_spread(list(dict.fromkeys(map(capture_key, here))), MOST_CAPTURES))
            here = _spread([row for row in here if capture_key(row) in keys], most)
        kept += here
    return kept + left_out


def _spread(things: Sequence[Any], most: int) -> list[Any]:
    step = max(1.0, len(things) / most)
    return [things[math.floor(k * step)] for k in range(min(most, len(things)))]


def run_tasks(
    task: Callable[[Any, list[Row]], list[Any]],
    rows: Sequence[Row],
    workers: int,
    say: Callable[[str], None],
    keep: Callable[[list[Any]], None] = lambda found: None,
    path: type[PlannerPath] = PlannerPath,
    limit_s: float = math.inf,
) -> list[tuple[list[Row], list[Any]]]:
    """task of the rows that share a capture, on so many processes. keep: is given what each task found. limit_s: what
    is not done by then is not waited for."""
    tasks: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if not row.left_out:
            tasks[capture_key(row)].append(row)
    for mine in tasks.values():
        mine.sort(key=lambda row: (row.model.layers if row.model else 0, str(row.where), row.layout))
    work = sorted(tasks.values(), key=len, reverse=True)
    started, done, count = time.monotonic(), [], 0
    with multiprocessing.get_context("spawn").Pool(workers, _begin, (path,)) as pool:
        results = pool.imap_unordered(_run_task, [(task, mine) for mine in work])
        for _ in work:
            left_s = started + limit_s - time.monotonic()
            try:
                found = results.next(timeout=None if limit_s == math.inf else max(0.0, left_s))
            except multiprocessing.TimeoutError:
                say(f"time is up: {count} rows are done")
                break
            done.append(found)
            keep(found[1])
            count += len(found[0])
            say(f"{count} of {sum(map(len, work))} rows, {time.monotonic() - started:.0f} s")
    return done


def _begin(path: type[PlannerPath]) -> None:
    _PATH.append(path())


def _run_task(given: tuple[Callable[[Any, list[Row]], list[Any]], list[Row]]) -> tuple[list[Row], list[Any]]:
    task, rows = given
    return rows, task(_PATH[0], rows)


def predict_all(
    rows: Sequence[Row], workers: int, say: Callable[[str], None], limit_s: float = math.inf
) -> list[Judged]:
    done = run_tasks(_predictions, rows, workers, say, limit_s=limit_s)
    judged = [Judged(row, one) for mine, found in done for row, one in zip(mine, found, strict=True)]
    return sorted(judged, key=lambda one: (one.row.source, one.row.number))


def _predictions(path: PlannerPath, rows: list[Row]) -> list[Prediction]:
    return [path.predict(row) for row in rows]


def as_json(judged: Sequence[Judged], rows: Sequence[Row]) -> dict[str, Any]:
    lines = [_row_json(one.row) | {"predicted": asdict(one.found), "ratio": one.ratio} for one in judged]
    return {"rows": lines, "left_out": [_row_json(row) for row in rows if row.left_out]}


def read_kept(path: Path, rows: Sequence[Row]) -> list[Judged]:
    """Those of rows whose predictions a file of --json has."""
    found = {(line["source"], line["number"]): line["predicted"] for line in json.loads(path.read_text())["rows"]}
    kept = [row for row in rows if (row.source, row.number) in found]
    return [Judged(row, Prediction(**found[row.source, row.number])) for row in kept]


def _row_json(row: Row) -> Mapping[str, Any]:
    return asdict(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CSV files of published runs")
    parser.add_argument("--only", default="", help="files whose names begin so")
    parser.add_argument("--sample", type=int, default=DEFAULT_SAMPLE, help="most rows of a source; 0: all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--time-limit", type=float, default=math.inf, metavar="SECONDS", help="report what is done then"
    )
    parser.add_argument("--json", type=Path, help="write every row with its prediction here")
    parser.add_argument("--kept", type=Path, help="report what --json wrote here, and predict nothing")
    parser.add_argument("--worst", type=int, default=0, help="list so many rows that are predicted worst")
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name} and benchmarks/results")
    args = parser.parse_args()
    if not args.data.is_dir():
        print(f"{args.data} is not a folder", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    rows = sampled(read_rows(args.data, args.only), args.sample)
    say = functools.partial(print, file=sys.stderr, flush=True)
    if args.kept is not None:
        judged = read_kept(args.kept, rows)
    else:
        judged = predict_all(rows, args.workers, say, args.time_limit)
    text = tables(judged, rows)
    print(text)
    if args.worst:
        print("\n" + worst(judged, args.worst))
    print(f"\n{len(judged)} rows in {time.monotonic() - started:.0f} s", file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(judged, rows), indent=1))
    if args.write:
        write(judged, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
