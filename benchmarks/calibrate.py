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
import functools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from calibrate_parts import DISPATCHES, MOVES, Parts, PartsPath, parts_of_rows
from published import run_tasks, sampled
from published_rows import read_rows
from published_statistics import quantile
from published_tables import table
from published_validation import CALIBRATION

from shardwright.costmodel.stacks import OWN_STACK, STACKS_FILE, StackFigures, stacks

FOLDS = 5
# Least and most that a fit may say of each figure.
LIMITS = {"product_factor": (0.7, 1.6), "attention_factor": (0.3, 4.0), "memory_factor": (0.3, 3.0),
          "op_s": (0.0, 4e-5), "tensor_factor": (0.3, 4.0), "state_contention": (0.0, 1.0),
          "unhidden_fraction": (0.0, 1.0)}  # fmt: skip
NOT_FITTED = ("dlperf",)  # a cube mesh of NVLink between V100, which the catalog has as a switch
PULL = 0.003  # to where a figure is neutral: the error that moving it as far as its slope was taken must be worth
ROUNDS = 60
NEUTRAL = StackFigures()
HOPPER = "hopper_factor"
CAPTION = f"""Median and 90th percentile of |predicted / measured - 1| with the figures that stacks had before the fit,
with fitted ones, and with figures fitted without the row's group (a model on so many GPUs), in {FOLDS} folds."""


# ------------------------------------------------------------------ fit


def fit(rows: Sequence[Parts]) -> dict[str, float]:
    """The best of all fits with one dispatch time; each source of a stack weighs as the square root of its rows."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.source] += 1
    weights = np.array([counts[row.source] ** -0.5 for row in rows])
    weights /= weights.sum()
    names = [name for name in MOVES if any(row.slopes[name] for row in rows)]
    if {row.is_hopper for row in rows} == {True, False}:
        names.append(HOPPER)  # here the product of both factors, for the rows of that generation
    measured = np.array([row.measured_s for row in rows])
    slopes = np.array([[_slope(row, name, names) for name in names] for row in rows]) / measured[:, None]
    tried = []
    for dispatch_s in np.linspace(0.0, DISPATCHES[-1], 17):
        rest = np.array([row.rest_s(dispatch_s) for row in rows]) / measured
        loss, values = _fit_rest(names, slopes, rest, weights)
        loss += PULL * dispatch_s / DISPATCHES[-1]
        tried.append((loss, {**dict(zip(names, values.tolist(), strict=True)), "dispatch_s": float(dispatch_s)}))
    best = min(tried, key=lambda one: one[0])[1]
    if HOPPER in best:
        best[HOPPER] /= best["product_factor"]
    return best


def _slope(row: Parts, name: str, names: Sequence[str]) -> float:
    apart = HOPPER in names and row.is_hopper
    if name == HOPPER:
        return row.slopes["product_factor"] if apart else 0.0
    return 0.0 if apart and name == "product_factor" else row.slopes[name]


def _fit_rest(
    names: Sequence[str], slopes: np.ndarray, rest: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray]:
    """(loss, figures): coordinate descent on squares of errors, weighted so that they count as absolute values.
    slopes, rest: over the measured step."""
    values = np.array([getattr(NEUTRAL, name) for name in names])
    start, pull = values.copy(), np.array([PULL / MOVES.get(name, 0.1) ** 2 for name in names])
    for _ in range(ROUNDS):
        ratios = np.maximum(rest + slopes @ values, 1e-3)
        robust = weights / np.maximum(np.abs(np.log(ratios)), 0.01) / ratios
        square, linear = (slopes * robust[:, None]).T @ slopes, slopes.T @ (robust * (1 - rest))
        for k, name in enumerate(names):
            others = square[k] @ values - square[k, k] * values[k]
            best = (linear[k] + pull[k] * start[k] - others) / (square[k, k] + pull[k])
            values[k] = np.clip(best, *LIMITS.get(name, (0.6, 1.6)))
    errors = np.abs(np.log(np.maximum(rest + slopes @ values, 1e-3)))
    return float((weights * errors).sum() + (pull * (values - start) ** 2).sum() / 2), values


def predicted(row: Parts, figures: Mapping[str, float]) -> float:
    others = {name: figures.get(name, getattr(NEUTRAL, name)) for name in row.slopes}
    if row.is_hopper:
        others["product_factor"] *= figures.get(HOPPER, 1.0)
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
        if not row.source.startswith(NOT_FITTED):
            found[row.stack.partition("+")[0]].append(row)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Fitted:
    """Of one stack. error: median of all its rows, k-fold. spread, order_error: as Stack has them. lines: source, rows,
    and median and 90th percentile of the error before the fit, fitted and k-fold."""

    figures: dict[str, float]
    num_rows: int
    error: float
    spread: tuple[float, float]
    order_error: float
    lines: list[tuple[object, ...]]


def fit_stacks(rows: Sequence[Parts]) -> dict[str, Fitted]:
    found = {}
    for stack, here in by_stack(rows).items():
        figures, ratios = fit(here), k_fold(here)
        errors = [abs(ratio - 1) for ratio in ratios]
        lines: list[tuple[object, ...]] = []
        for source in sorted({row.source for row in here}):
            mine = [k for k, row in enumerate(here) if row.source == source]
            before = [abs(here[k].base_s / here[k].measured_s - 1) for k in mine]
            fitted = [abs(predicted(here[k], figures) / here[k].measured_s - 1) for k in mine]
            held = [errors[k] for k in mine]
            shown = [f"{quantile(e, share):.1%}" for e in (before, fitted, held) for share in (0.5, 0.9)]
            lines.append((stack, source, len(mine), *shown))
        found[stack] = Fitted(
            figures, len(here), quantile(errors, 0.5), spread(ratios), order_error(here, ratios), lines
        )
    return found


def spread(ratios: Sequence[float]) -> tuple[float, float]:
    """10th and 90th percentile of measured over predicted."""
    return quantile([1 / ratio for ratio in ratios], 0.1), quantile([1 / ratio for ratio in ratios], 0.9)


def order_error(rows: Sequence[Parts], ratios: Sequence[float]) -> float:
    """Median error of the ratio of two rows' steps, of all pairs of a group."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row, ratio in zip(rows, ratios, strict=True):
        groups[row.group].append(ratio)
    pairs = [pair for group in groups.values() for pair in combinations(group, 2)]
    return quantile([max(a / b, b / a) - 1 for a, b in pairs], 0.5) if pairs else 0.0


def neutral(rows: Sequence[Parts]) -> tuple[tuple[float, float], float]:
    """(spread, order_error) of all rows with neutral figures: of a stack of which no run is published."""
    ratios = [predicted(row, {}) / row.measured_s for row in rows]
    return spread(ratios), order_error(rows, ratios)


def report(found: Mapping[str, Fitted]) -> str:
    head = ("stack", "source", "rows", "before, median", "90th", "fitted, median", "90th", "k-fold, median", "90th")
    return table(head, [line for one in found.values() for line in one.lines])


def _says(name: str, value: float) -> bool:
    """Is it other than neutral, as it is written?"""
    least = 1e-7 if name.endswith("_s") else 1e-3
    return float(f"{value:.3g}") != getattr(NEUTRAL, name) and value >= least


def write(found: Mapping[str, Fitted], own: tuple[tuple[float, float], float]) -> None:
    """Into each stack's table, in place of the figures that it has; and the errors. own: of plans that this package
    runs, for which there are no figures."""
    text = STACKS_FILE.read_text()
    month = f"{datetime.date.today():%Y-%m}"
    for stack, one in found.items():
        known = stacks()[stack]
        pattern = rf'(\[stacks\.{stack}\]\nmeaning = "[^"]*"\n).*?(?=\n\[|\Z)'
        lines = [
            f'source = "{one.num_rows} published runs (benchmarks/calibrate.py): median error {one.error:.1%}, k-fold"',
            'kind = "fitted"',
            f'date = "{month}"',
            *_uncertainty(one.spread, one.order_error),
            *([f"memory_error = {known.memory_error:g}"] if known.memory_error is not None else []),
            *(f"{name} = {value:.3g}" for name, value in one.figures.items() if _says(name, value)),
        ]
        text = re.sub(pattern, lambda old, lines=lines: old[1] + "\n".join(lines) + "\n", text, flags=re.DOTALL)
    table = re.search(rf"\[stacks\.{OWN_STACK}\]\n.*?(?=\n\[)", text, flags=re.DOTALL)
    assert table is not None
    kept = [line for line in table[0].rstrip().split("\n") if not line.startswith(("spread", "order_error"))]
    text = text.replace(table[0], "\n".join([*kept, *_uncertainty(*own)]) + "\n")
    STACKS_FILE.write_text(text)
    CALIBRATION.write_text(f"# Errors of stacks that calibrate.py fits\n\n{CAPTION}\n\n{report(found)}\n")


def _uncertainty(spread: tuple[float, float], order_error: float) -> list[str]:
    return [f"spread = [{spread[0]:.3g}, {spread[1]:.3g}]", f"order_error = {order_error:.2g}"]


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

        say = functools.partial(print, file=sys.stderr, flush=True)
        run_tasks(parts_of_rows, chosen, args.workers, say, keep, PartsPath)
    found = fit_stacks([row for row in rows if not args.only or row.source.startswith(args.only)])
    print(report(found))
    for stack, one in found.items():
        print(f"{stack}: " + ", ".join(f"{name} {value:.4g}" for name, value in one.figures.items()))
    if args.write:
        write(found, neutral([row for here in by_stack(rows).values() for row in here]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
