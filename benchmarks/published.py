"""How well the planner predicts published training runs, through the path that `shardwright plan` takes.

    python benchmarks/published.py --data FOLDER              table by source
    python benchmarks/published.py --data FOLDER --worst 20   and the rows predicted worst
    ... --only SOURCE     files whose names begin so
    ... --sample N        at most N rows of a source, evenly spaced (0: all)
    ... --json PATH       every row with its prediction
    ... --write           benchmarks/results/published.md

Each row's model is captured as a transformers configuration of its sizes, its layout is forced, and the search's own
evaluation gives step time and memory (published_path.py). FOLDER holds CSV files of published runs, which are not part
of the repository.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from published_path import PlannerPath, Prediction, capture_key
from published_rows import Row, read_rows
from published_statistics import Judged, choices, fit_of, quantile, time_errors

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "published.md"
DEFAULT_SAMPLE = 150  # of a source: all sources within ten minutes on two cores
_PATH: list[PlannerPath] = []  # of this worker process


def sampled(rows: Iterable[Row], most: int) -> list[Row]:
    """At most so many of each source that can be predicted, evenly spaced in its file; and all that cannot."""
    by_source: dict[str, list[Row]] = defaultdict(list)
    left_out = []
    for row in rows:
        (left_out if row.left_out else by_source[row.source]).append(row)
    kept: list[Row] = []
    for here in by_source.values():
        step = max(1.0, len(here) / most) if most else 1.0
        kept += [here[math.floor(k * step)] for k in range(math.ceil(len(here) / step)) if k * step < len(here)]
    return kept + left_out


def run_tasks(
    task: Callable[[PlannerPath, list[Row]], list[Any]],
    rows: Sequence[Row],
    workers: int,
    say: Callable[[str], None],
    keep: Callable[[list[Any]], None] = lambda found: None,
) -> list[tuple[list[Row], list[Any]]]:
    """task of the rows that share a capture, on so many processes. keep: is given what each task found."""
    tasks: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if not row.left_out:
            tasks[capture_key(row)].append(row)
    for mine in tasks.values():
        mine.sort(key=lambda row: (row.model.layers if row.model else 0, str(row.where), row.layout))
    work = sorted(tasks.values(), key=len, reverse=True)
    started, done, count = time.monotonic(), [], 0
    with multiprocessing.get_context("spawn").Pool(workers, _begin) as pool:
        for found in pool.imap_unordered(_run_task, [(task, mine) for mine in work]):
            done.append(found)
            keep(found[1])
            count += len(found[0])
            say(f"{count} of {sum(map(len, work))} rows, {time.monotonic() - started:.0f} s")
    return done


def _begin() -> None:
    _PATH.append(PlannerPath())


def _run_task(given: tuple[Callable[[PlannerPath, list[Row]], list[Any]], list[Row]]) -> tuple[list[Row], list[Any]]:
    task, rows = given
    return rows, task(_PATH[0], rows)


def predict_all(rows: Sequence[Row], workers: int, say: Callable[[str], None]) -> list[Judged]:
    done = run_tasks(_predictions, rows, workers, say)
    judged = [Judged(row, one) for mine, found in done for row, one in zip(mine, found, strict=True)]
    return sorted(judged, key=lambda one: (one.row.source, one.row.number))


def _predictions(path: PlannerPath, rows: list[Row]) -> list[Prediction]:
    return [path.predict(row) for row in rows]


# ------------------------------------------------------------------ report


def by_source(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    found: dict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        found[one.row.source].append(one)
        if one.row.source == "nanotron_ultrascale_h100" and one.row.quiet:
            found["nanotron, quiet layouts"].append(one)
    return dict(sorted(found.items()))


def tables(judged: Sequence[Judged], rows: Sequence[Row]) -> str:
    """In Markdown."""
    sources = by_source(judged)
    parts = [
        "## Step time\n",
        _table(
            ("source", "rows", "median error", "90th percentile", "predicted / measured"),
            [
                (name, errors.rows, _percent(errors.median), _percent(errors.p90), f"{errors.bias:.3f}")
                for name, errors in ((name, time_errors(here)) for name, here in sources.items())
                if errors.rows
            ],
        ),
        "\n## Order within a model and number of GPUs\n",
        _table(
            ("source", "groups", "rank correlation, median", "least", "regret, mean", "most"),
            [line for name, here in sources.items() for line in _choice_line(name, here)],
        ),
        "\n## Memory\n",
        _table(
            ("source", "rows", "median error", "90th percentile", "predicted / published", "ran out", "recall",
             "ran", "false alarms"),
            [line for name, here in sources.items() for line in _memory_line(name, here)],
        ),
        "\n## Rows left out\n",
        _table(("source", "rows", "reason"), _left_out(judged, rows)),
    ]  # fmt: skip
    return "\n".join(parts)


def _choice_line(name: str, judged: Sequence[Judged]) -> list[tuple[object, ...]]:
    found = choices(judged)
    if not found:
        return []
    known = [one.correlation for one in found if not math.isnan(one.correlation)]
    regrets = [one.regret for one in found]
    return [
        (name, len(found), f"{quantile(known, 0.5):.2f}", f"{min(known, default=math.nan):.2f}",
         _percent(sum(regrets) / len(regrets)), _percent(max(regrets)))
    ]  # fmt: skip


def _memory_line(name: str, judged: Sequence[Judged]) -> list[tuple[object, ...]]:
    ratios = [one.memory_ratio for one in judged if one.memory_ratio is not None]
    errors, fit = [abs(ratio - 1) for ratio in ratios], fit_of(judged)
    if not ratios and not fit.failed and not fit.ran:
        return []
    return [
        (name, len(ratios), _percent(quantile(errors, 0.5)), _percent(quantile(errors, 0.9)),
         _number(quantile(ratios, 0.5)), fit.failed, _percent(fit.recall), fit.ran, _percent(fit.false_alarms))
    ]  # fmt: skip


def _left_out(judged: Sequence[Judged], rows: Sequence[Row]) -> list[tuple[object, ...]]:
    counted = Counter((row.source, reason) for row in rows for reason in row.left_out)
    counted.update((one.row.source, f"refused: {one.found.error}"[:90]) for one in judged if one.found.error)
    return [(source, number, reason) for (source, reason), number in sorted(counted.items())]


def _table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    out = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*out, *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def worst(judged: Sequence[Judged], count: int) -> str:
    timed = [one for one in judged if one.ratio is not None and one.row.quiet]
    timed.sort(key=lambda one: abs(math.log(one.ratio or 1.0)), reverse=True)
    return _table(
        ("source", "row", "model", "GPUs", "layout", "measured s", "predicted s", "ratio", "unlike"),
        [
            (one.row.source, one.row.number, one.row.name, one.row.num_gpus, one.row.layout,
             f"{one.row.measured_s:.3f}", f"{one.found.step_s:.3f}", f"{one.ratio:.2f}", "; ".join(one.row.unlike))
            for one in timed[:count]
        ],
    )  # fmt: skip


def as_json(judged: Sequence[Judged], rows: Sequence[Row]) -> dict[str, Any]:
    lines = [_row_json(one.row) | {"predicted": asdict(one.found), "ratio": one.ratio} for one in judged]
    return {"rows": lines, "left_out": [_row_json(row) for row in rows if row.left_out]}


def _row_json(row: Row) -> Mapping[str, Any]:
    return asdict(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CSV files of published runs")
    parser.add_argument("--only", default="", help="files whose names begin so")
    parser.add_argument("--sample", type=int, default=DEFAULT_SAMPLE, help="most rows of a source; 0: all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every row with its prediction here")
    parser.add_argument("--worst", type=int, default=0, help="list so many rows that are predicted worst")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    if not args.data.is_dir():
        print(f"{args.data} is not a folder", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    rows = sampled(read_rows(args.data, args.only), args.sample)
    judged = predict_all(rows, args.workers, lambda line: print(line, file=sys.stderr, flush=True))
    text = tables(judged, rows)
    print(text)
    if args.worst:
        print("\n" + worst(judged, args.worst))
    print(f"\n{len(judged)} rows in {time.monotonic() - started:.0f} s", file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(judged, rows), indent=1))
    if args.write:
        RESULTS.write_text(
            f"# Published training runs\n\n`benchmarks/published.py`, {datetime.date.today()}.\n\n{text}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
