"""Fits the figures of software stacks (costmodel/stacks.toml) to published runs, through the planner's own path.

    python benchmarks/calibrate.py --data FOLDER --parts PATH         fit and print, k-fold errors with it
    python benchmarks/calibrate.py --data FOLDER --parts PATH --write and put the figures into costmodel/stacks.toml

Every row is predicted as benchmarks/published.py does it, once with its stack's present figures and once with each
figure moved; steps are sums of what the figures scale, so that these slopes say what a step is with others. --parts
keeps them: a fit of kept slopes takes seconds. The figures of a stack minimize the mean |log(predicted / measured)|
over its rows, with a pull to where they are neutral. Errors are k-fold: the groups (a model on so many GPUs) are dealt
into folds, and each fold is predicted with figures that were fitted without it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from published import run_tasks, sampled
from published_path import PlannerPath
from published_rows import Row, read_rows
from published_statistics import quantile

from shardwright.costmodel.stacks import STACKS_FILE, StackFigures, kernels, stack_named

FOLDS = 5
# Of each figure: how far it is moved for a slope, least and most that a fit may say, and the pull to where it is
# neutral, as the error that a move by its reach costs.
MOVES = {"product_factor": 0.1, "attention_factor": 0.2, "memory_factor": 0.2, "op_s": 4e-6, "tensor_factor": 0.3,
         "state_contention": 0.2, "unhidden_fraction": 0.3}  # fmt: skip
LIMITS = {"product_factor": (0.7, 1.6), "attention_factor": (0.3, 4.0), "memory_factor": (0.3, 3.0),
          "op_s": (0.0, 4e-5), "tensor_factor": (0.3, 4.0), "state_contention": (0.0, 1.0),
          "unhidden_fraction": (0.0, 1.0)}  # fmt: skip
DISPATCHES = (1e-5, 2e-5, 4e-5, 8e-5)  # a step is no sum of these: it is predicted at each, and in between is a line
PULL = 0.003
ROUNDS = 60
NEUTRAL = StackFigures()


@dataclass(frozen=True)
class Parts:
    """A row's predicted step at some figures of its stack, and how it grows with each of them."""

    source: str
    number: int
    group: str
    stack: str
    measured_s: float
    base_s: float
    slopes: Mapping[str, float]
    figures: Mapping[str, float]
    waiting_s: Sequence[float] = (0.0,) * len(DISPATCHES)  # added where the host takes so long to start an op

    def rest_s(self, dispatch_s: float) -> float:
        """Where all other figures are 0: factors too."""
        waiting_s = float(np.interp(dispatch_s, (0.0, *DISPATCHES), (0.0, *self.waiting_s)))
        return self.base_s + waiting_s - sum(self.slopes[name] * self.figures[name] for name in self.slopes)


def parts_of(path: PlannerPath, row: Row) -> Parts | None:
    """None where the planner refuses the row."""
    stack = stack_named(row.stack)
    base = path.predict(row, stack).step_s
    if base is None or row.measured_s is None:
        return None
    slopes = {name: _slope(path, row, name, base) for name in MOVES}
    waiting = [path.predict(row, stack.with_figures(dispatch_s=value)).step_s or base for value in DISPATCHES]
    figures = asdict(stack.figures)
    kernel = row.stack.partition("+")[2]
    if kernel:  # its factor stays beside the one that is fitted
        figures["attention_factor"] /= kernels()[kernel]
        slopes["attention_factor"] *= kernels()[kernel]
    added = [seconds - base for seconds in waiting]
    return Parts(row.source, row.number, row.group, row.stack, row.measured_s, base, slopes, figures, added)


def _slope(path: PlannerPath, row: Row, name: str, base_s: float) -> float:
    if name == "tensor_factor" and row.force["tp"] == "1":
        return 0.0
    if name in ("state_contention", "unhidden_fraction") and row.force["dp"] == "1":
        return 0.0
    stack, move = stack_named(row.stack), MOVES[name]
    moved = path.predict(row, stack.with_figures(**{name: getattr(stack.figures, name) + move})).step_s
    return 0.0 if moved is None else (moved - base_s) / move


def _parts_task(path: PlannerPath, rows: list[Row]) -> list[Parts]:
    return [found for found in (parts_of(path, row) for row in rows) if found is not None]


# ------------------------------------------------------------------ fit


def fit(rows: Sequence[Parts]) -> dict[str, float]:
    """The best of all fits with one dispatch time; each source of a stack weighs as the square root of its rows."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.source] += 1
    weights = np.array([counts[row.source] ** -0.5 for row in rows])
    weights /= weights.sum()
    tried = [_fit_rest(rows, weights, dispatch_s) for dispatch_s in np.linspace(0.0, DISPATCHES[-1], 17)]
    return min(tried, key=lambda one: one[0])[1]


def _fit_rest(rows: Sequence[Parts], weights: np.ndarray, dispatch_s: float) -> tuple[float, dict[str, float]]:
    """(loss, figures): coordinate descent on squares of errors, weighted so that they count as absolute values."""
    names = [name for name in MOVES if any(row.slopes[name] for row in rows)]
    measured = np.array([row.measured_s for row in rows])
    slopes = np.array([[row.slopes[name] for name in names] for row in rows]) / measured[:, None]
    rest = np.array([row.rest_s(dispatch_s) for row in rows]) / measured
    values = np.array([getattr(NEUTRAL, name) for name in names])
    start, reach = values.copy(), np.array([MOVES[name] for name in names])
    for _ in range(ROUNDS):
        ratios = rest + slopes @ values
        errors = np.abs(np.log(np.maximum(ratios, 1e-3)))
        robust = weights / np.maximum(errors, 0.01) / np.maximum(ratios, 1e-3)
        for k, name in enumerate(names):
            others = rest + slopes @ values - slopes[:, k] * values[k]
            pull = PULL / reach[k] ** 2
            top = (robust * slopes[:, k] * (1 - others)).sum() + pull * start[k]
            values[k] = np.clip(top / ((robust * slopes[:, k] ** 2).sum() + pull), *LIMITS[name])
    errors = np.abs(np.log(np.maximum(rest + slopes @ values, 1e-3)))
    loss = float((weights * errors).sum() + PULL * (((values - start) / reach) ** 2).sum() / 2)
    return loss, {**dict(zip(names, values.tolist(), strict=True)), "dispatch_s": float(dispatch_s)}


def predicted(row: Parts, figures: Mapping[str, float]) -> float:
    others = {name: figures.get(name, getattr(NEUTRAL, name)) for name in row.slopes}
    rest_s = row.rest_s(figures.get("dispatch_s", 0.0))
    return rest_s + sum(row.slopes[name] * value for name, value in others.items())


def k_fold(rows: Sequence[Parts]) -> list[float]:
    """Of each row, predicted over measured with figures fitted without its fold."""
    groups = sorted({row.group for row in rows})
    fold_of = {group: k % FOLDS for k, group in enumerate(groups)}
    ratios = [0.0] * len(rows)
    for fold in range(FOLDS):
        known = [row for row in rows if fold_of[row.group] != fold]
        figures = fit(known) if known else {}
        for k, row in enumerate(rows):
            if fold_of[row.group] == fold:
                ratios[k] = predicted(row, figures) / row.measured_s
    return ratios


def by_stack(rows: Sequence[Parts]) -> dict[str, list[Parts]]:
    found: dict[str, list[Parts]] = defaultdict(list)
    for row in rows:
        found[row.stack.partition("+")[0]].append(row)
    return dict(sorted(found.items()))


def report(rows: Sequence[Parts]) -> dict[str, tuple[dict[str, float], float, int]]:
    """Prints; returns figures, median k-fold error and number of rows of each stack."""
    found = {}
    for stack, here in by_stack(rows).items():
        figures, ratios = fit(here), k_fold(here)
        errors = [abs(ratio - 1) for ratio in ratios]
        found[stack] = figures, quantile(errors, 0.5), len(here)
        print(f"\n{stack}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        for source in sorted({row.source for row in here}):
            mine = [k for k, row in enumerate(here) if row.source == source]
            before = [abs(here[k].base_s / here[k].measured_s - 1) for k in mine]
            fitted = [abs(predicted(here[k], figures) / here[k].measured_s - 1) for k in mine]
            held = [errors[k] for k in mine]
            cells = (f"{quantile(e, 0.5):.1%} {quantile(e, 0.9):.1%}" for e in (before, fitted, held))
            bias = quantile([ratios[k] for k in mine], 0.5)
            print(f"  {source:32s} {len(mine):4d} rows: before, fitted, k-fold: " + " | ".join(cells), f" {bias:.3f}")
    return found


def write(found: Mapping[str, tuple[Mapping[str, float], float, int]]) -> None:
    """Into each stack's table, in place of the figures that it has."""
    text = STACKS_FILE.read_text()
    month = f"{datetime.date.today():%Y-%m}"
    for stack, (figures, error, count) in found.items():
        pattern = rf'(\[stacks\.{stack}\]\nmeaning = "[^"]*"\n).*?(?=\n\[|\Z)'
        lines = [
            f'source = "{count} published runs (benchmarks/calibrate.py): median error {error:.1%}, k-fold by group"',
            'kind = "fitted"',
            f'date = "{month}"',
            *(f"{name} = {value:.3g}" for name, value in figures.items()),
        ]
        text = re.sub(pattern, lambda old, lines=lines: old[1] + "\n".join(lines) + "\n", text, flags=re.DOTALL)
    STACKS_FILE.write_text(text)


def _read_parts(path: Path) -> list[Parts]:
    if not path.is_file():
        return []
    return [Parts(**json.loads(line)) for line in path.read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CSV files of published runs")
    parser.add_argument("--only", default="", help="files whose names begin so")
    parser.add_argument("--sample", type=int, default=60, help="most rows of a source; 0: all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parts", type=Path, required=True, help="where slopes are kept, and read if they are there")
    parser.add_argument("--fit-kept", action="store_true", help="fit what is kept, and predict no more rows")
    parser.add_argument("--write", action="store_true", help=f"write {STACKS_FILE.name}")
    args = parser.parse_args()
    kept = _read_parts(args.parts)
    if args.fit_kept:
        rows = list(kept)
    else:
        timed = (row for row in read_rows(args.data, args.only) if row.measured_s is not None and row.quiet)
        known = {(row.source, row.number) for row in kept}
        chosen = [row for row in sampled(timed, args.sample) if not row.left_out]
        chosen = [row for row in chosen if (row.source, row.number) not in known]
        rows = list(kept)

        def keep(found: list[Parts]) -> None:
            rows.extend(found)
            with args.parts.open("a") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in found)

        run_tasks(_parts_task, chosen, args.workers, lambda line: print(line, file=sys.stderr, flush=True), keep)
    found = report([row for row in rows if not args.only or row.source.startswith(args.only)])
    if args.write:
        write(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
