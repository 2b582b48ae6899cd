"""How well the cost model predicts published measurements.

    python benchmarks/costmodel.py FOLDER                 median and p90 relative error by file
    python benchmarks/costmodel.py FOLDER --rows FILE     every row of one file, worst first
    python benchmarks/costmodel.py FOLDER --fit steps     fit constants on step times (or: collectives), print them
    ... --write                                           and write them to costmodel/constants.toml
    python benchmarks/costmodel.py                        the sanity checks that need no data

FOLDER holds the CSV files of published runs, which are not part of the repository. Relative error is
|predicted / measured - 1|, of seconds a step and of seconds a collective.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from published_collectives import Collective, read_collectives
from published_runs import FRAMEWORKS, Run, read_runs
from transformer_run import Layout, Software, Transformer, step_time

from shardwright.costmodel.constants import CONSTANTS_FILE, Constants, default_constants
from shardwright.costmodel.model import CostModel
from shardwright.profiler.cluster import Cluster
from shardwright.profiler.hardware import parse_hardware

# Constants of the cost model fitted on runs (group, key), and figures of each framework fitted beside them.
FITTED = [
    ("sustained_fraction", key)
    for key in ("default", "A100", "H100", "H100-fp8", "H100-SXM-96GB", "V100", "B200", "GB200")
] + [
    ("attention_efficiency", "A100"), ("attention_efficiency", "H100"), ("attention_backward_efficiency", "A100"),
    ("attention_backward_efficiency", "H100"), ("matmul_memory_share", "default"), ("memory_efficiency", "pointwise"),
    ("contention_per_doubling", "EFA-3200"),
]  # fmt: skip
FITTED_ON_COLLECTIVES = [
    ("link_efficiency", key) for key in ("NVLink3", "NVLink4", "NVLink5", "infiniband", "roce", "efa")
] + [
    ("multicast_efficiency", "NVLink4"), ("multicast_efficiency", "NVLink5"), ("tree_efficiency", "default"),
    ("chunk_bytes", "default"), ("chunk_bytes", "efa"),
]  # fmt: skip
FRAMEWORK_FIGURES = {
    "nanotron": ("dispatch_s", "tp_overlap", "dp_overlap", "step_overhead"),
    "aleph": ("dispatch_s", "step_overhead"),
    "foundry": ("attention_slowdown", "dp_overlap", "step_overhead"),
    "titan": ("tp_overlap", "dp_overlap", "step_overhead"),
    "nemo": ("attention_slowdown", "tp_overlap", "dp_overlap", "step_overhead"),
    "megatron2021": ("dispatch_s", "step_overhead"),
    "deepspeed": ("step_overhead",),
}
FRACTIONS = {"tp_overlap", "dp_overlap", "matmul_memory_share", "step_overhead"}
UNIT_GROUPS = ("_fraction", "_efficiency")
# Where a fit starts that must not know what the full fit found.
NEUTRAL = {"sustained_fraction": 0.85, "attention_efficiency": 0.5, "attention_backward_efficiency": 0.45,
           "matmul_memory_share": 0.5, "memory_efficiency": 0.75, "contention_per_doubling": 0.3}  # fmt: skip
PRIOR_WEIGHT = 0.02  # keeps figures that the data barely constrain near where they start


def predict(run: Run, constants: Constants, software: Software | None = None) -> float:
    return step_time(CostModel(run.cluster, constants), run.model, run.layout, software or run.software).step_s


def is_clean(run: Run) -> bool:
    """Rows fit for fitting.

    The nanotron sweep ran on a shared network, where steps of one layout vary by factors of ten and more: with tensor
    parallelism across hosts, and in pipelines over many hosts, under ZeRO-0, or with four and more tensor-parallel
    ranks, whose messages then take tens of milliseconds each. No model of a healthy network gives that.
    """
    if run.framework != "nanotron":
        return True
    layout, hosts = run.layout, run.cluster.num_hosts
    if layout.pp > 1:
        return hosts <= 8 and layout.tp <= 2 and (layout.zero == 1 or layout.dp == 1)
    return hosts <= 32 and layout.tp <= 8


def quantile(values: list[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def print_errors(title: str, ratios: dict[str, list[float]]) -> None:
    print(f"\n{title:34s} {'rows':>5s} {'median':>7s} {'p90':>7s}   predicted / measured: p10, median, p90")
    everything = [ratio for values in ratios.values() for ratio in values]
    for name, values in [*ratios.items(), ("all", everything)]:
        errors = [abs(value - 1) for value in values]
        spread = ", ".join(f"{quantile(values, fraction):.2f}" for fraction in (0.1, 0.5, 0.9))
        print(f"{name:34s} {len(values):5d} {quantile(errors, 0.5):7.1%} {quantile(errors, 0.9):7.1%}   {spread}")


def report(folder: Path, constants: Constants) -> None:
    ratios: dict[str, list[float]] = defaultdict(list)
    clean: dict[str, list[float]] = defaultdict(list)
    for run in read_runs(folder):
        ratio = predict(run, constants) / run.step_s
        ratios[run.file].append(ratio)
        if run.framework == "nanotron" and is_clean(run):
            clean[run.file + " (clean)"].append(ratio)
    if ratios:
        print_errors("step time", ratios)
        if clean:
            print_errors("quiet part of the nanotron sweep", clean)
    collectives: dict[str, list[float]] = defaultdict(list)
    for one in read_collectives(folder):
        seconds = CostModel(one.cluster, constants).collective_seconds(one.kind, one.num_bytes, one.group)
        size = "1 MiB and more" if one.num_bytes >= 1 << 20 else "below 1 MiB"
        collectives[f"{one.kind}, {size}"].append(seconds / one.seconds)
    if collectives:
        print_errors("collectives", collectives)


def print_left_out(folder: Path, constants: Constants, prefix: str) -> None:
    """Files that no constant was fitted on, with a framework of average habits."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for run in read_runs(folder):
        if run.file.startswith(prefix):
            figures = {name: getattr(Software(), name) for name in FRAMEWORK_FIGURES.get(run.framework, ())}
            ratios[run.file].append(
                predict(run, constants, replace(run.software, **_scaled(run, figures))) / run.step_s
            )
    print_errors("left out of the fit", ratios)


def print_rows(folder: Path, constants: Constants, file: str) -> None:
    rows = [(predict(run, constants) / run.step_s, run) for run in read_runs(folder) if run.file.startswith(file)]
    for ratio, run in sorted(rows, key=lambda pair: abs(math.log(pair[0])), reverse=True):
        time = step_time(CostModel(run.cluster, constants), run.model, run.layout, run.software)
        parts = f"compute {time.compute_s:.3g} bubble {time.bubble_s:.3g} tp {time.tp_s:.3g} dp {time.dp_s:.3g}"
        print(
            f"{ratio:6.2f}  row {run.row:4d}  {run.label}  {run.step_s:.3f} s, predicted {time.step_s:.3f} s ({parts})"
        )


Figures = dict[tuple[str, str], float]


def _apply(constants: Constants, figures: Figures) -> tuple[Constants, dict[str, dict[str, float]]]:
    ours = {f"{group}.{key}": value for (group, key), value in figures.items() if group not in FRAMEWORK_FIGURES}
    theirs: dict[str, dict[str, float]] = defaultdict(dict)
    for (group, key), value in figures.items():
        if group in FRAMEWORK_FIGURES:
            theirs[group][key] = value
    return constants.replaced(ours), theirs


def _loss(runs: Iterable[Run], constants: Constants, figures: Figures, start: Figures) -> float:
    """Mean over files of the mean |log(predicted / measured)|, each file weighing the square root of its rows: robust
    to outliers, and no sweep outweighs the rest."""
    table, theirs = _apply(constants, figures)
    errors: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        software = (
            replace(run.software, **_scaled(run, theirs[run.framework])) if theirs[run.framework] else run.software
        )
        errors[run.file].append(abs(math.log(predict(run, table, software) / run.step_s)))
    fit = sum(math.sqrt(len(values)) * sum(values) / len(values) for values in errors.values())
    weight = sum(math.sqrt(len(values)) for values in errors.values())
    return fit / weight + _prior(figures, start)


def _prior(figures: Figures, start: Figures) -> float:
    return PRIOR_WEIGHT * sum(abs(math.log(figures[key] / start[key])) for key in figures) / len(figures)


def _scaled(run: Run, figures: dict[str, float]) -> dict[str, float]:
    """A row's own slowdown of attention (an older kernel) stays in proportion."""
    result = dict(figures)
    if "attention_slowdown" in result:
        result["attention_slowdown"] *= run.software.attention_slowdown / FRAMEWORKS[run.framework].attention_slowdown
    return result


def descend(figures: Figures, loss_of: Callable[[Figures], float], log: Callable[[str], None]) -> Figures:
    """Coordinate descent with shrinking multiplicative steps."""
    best = loss_of(figures)
    log(f"{len(figures)} figures, starting loss {best:.4f}")
    for step in (1.25, 1.25, 1.12, 1.12, 1.06, 1.03):
        for key in figures:
            for factor in (step, 1 / step):
                trial = {**figures, key: figures[key] * factor}
                if trial[key] > (0.98 if FRACTIONS & set(key) else 1.0 if key[0].endswith(UNIT_GROUPS) else math.inf):
                    continue
                loss = loss_of(trial)
                if loss < best - 1e-6:
                    figures, best = trial, loss
                    break
        log(f"step {step}: loss {best:.4f}")
    return figures


def fit_collectives(folder: Path, constants: Constants, log: Callable[[str], None] = print) -> Figures:
    """Mean |log error| of all-reduces from 64 KiB, each published curve weighing the square root of its points."""
    curves: dict[Cluster, list[Collective]] = defaultdict(list)
    for one in read_collectives(folder):
        # the other kinds were published as means over a shared network, with a definition of bandwidth left open
        if one.kind == "all_reduce" and one.num_bytes >= (1 << 20 if one.from_torch else 1 << 16):
            curves[one.cluster].append(one)
    start: Figures = {(group, key): constants.get(group, key) for group, key in FITTED_ON_COLLECTIVES}

    def loss_of(figures: Figures) -> float:
        table, _ = _apply(constants, figures)
        total = weight = 0.0
        for cluster, points in curves.items():
            model = CostModel(cluster, table)
            errors = [abs(math.log(model.collective_seconds(p.kind, p.num_bytes, p.group) / p.seconds)) for p in points]
            total, weight = total + sum(errors) / math.sqrt(len(errors)), weight + math.sqrt(len(errors))
        return total / weight + _prior(figures, start)

    return descend(start, loss_of, log)


def fit_steps(folder: Path, constants: Constants, leave_out: str = "", log: Callable[[str], None] = print) -> Figures:
    """Mean |log error| of step times over the clean rows, and half of those of the largest sweep."""
    runs = [run for run in read_runs(folder) if is_clean(run) and not (leave_out and run.file.startswith(leave_out))]
    runs = [run for run in runs if run.framework != "nanotron" or run.row % 2 == 0]
    start: Figures = {(group, key): NEUTRAL[group] if leave_out else constants.get(group, key) for group, key in FITTED}
    for framework, names in FRAMEWORK_FIGURES.items():
        if all(run.framework != framework for run in runs):
            continue
        start.update(
            {(framework, name): getattr(Software() if leave_out else FRAMEWORKS[framework], name) for name in names}
        )
    log(f"{len(runs)} rows")
    return descend(start, lambda figures: _loss(runs, constants, figures, start), log)


def write_constants(figures: Figures, source: str) -> None:
    """Put fitted values into the constants file, in place, where a group has that key."""
    text = CONSTANTS_FILE.read_text()
    for (group, key), value in figures.items():
        pattern = rf'(\[constants\.{group}\][^\[]*?\n{re.escape(key)} = \{{ value = )[^,]+, source = "\w+"'
        text = re.sub(pattern, lambda found, value=value: f'{found[1]}{value:.3g}, source = "{source}"', text, count=1)
    CONSTANTS_FILE.write_text(text)


def sanity(constants: Constants) -> None:
    """Llama 3 8B on 16 H100 at 8,192 tokens: MFU should come out between 0.3 and 0.65."""
    cluster = parse_hardware("2x8xH100-SXM-80GB")
    model = CostModel(cluster, constants)
    llama = Transformer(32, 4096, 14336, 32, 8, 128256, 8192, gated=True)
    software = Software(overlap_dp=True, dispatch_s=10e-6)
    print("\nLlama 3 8B, 2x8xH100-SXM-80GB, 256 sequences of 8,192 tokens")
    for name, layout in {
        "dp 16, ZeRO-3": Layout(16, 1, 1, 1, 1, 256, zero=3),
        "dp 16, ZeRO-3, recompute": Layout(16, 1, 1, 1, 2, 256, zero=3, recompute="full"),
        "dp 8, tp 2, ZeRO-1": Layout(8, 2, 1, 1, 1, 256, zero=1, sequence_parallel=True),
        "dp 4, tp 2, pp 2, ZeRO-1": Layout(4, 2, 2, 1, 1, 256, zero=1, sequence_parallel=True),
    }.items():
        step_s = step_time(model, llama, layout, software).step_s
        mfu = llama.flops_per_token() * 256 * 8192 / step_s / 16 / model.peak_flops_per_s("bf16")
        print(f"  {name:28s} {step_s:6.2f} s   MFU {mfu:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of CSV files of published runs")
    parser.add_argument("--rows", help="print every row of the files that start with this")
    parser.add_argument("--fit", choices=("collectives", "steps"), help="fit constants on the data and print them")
    parser.add_argument(
        "--leave-out", default="", help="with --fit steps: files that start with this are predicted unseen"
    )
    parser.add_argument("--write", action="store_true", help="with --fit: write costmodel/constants.toml")
    args = parser.parse_args()
    constants = default_constants()
    if args.folder is not None and not args.folder.is_dir():
        print(f"{args.folder} is not a folder", file=sys.stderr)
        return 2
    if args.folder is None:
        sanity(constants)
    elif args.rows:
        print_rows(args.folder, constants, args.rows)
    elif args.fit:
        if args.fit == "collectives":
            figures = fit_collectives(args.folder, constants)
        else:
            figures = fit_steps(args.folder, constants, args.leave_out)
        for (group, key), value in figures.items():
            print(f"{group}.{key} = {value:.4g}")
        if args.leave_out:
            print_left_out(args.folder, _apply(constants, figures)[0], args.leave_out)
        if args.write:
            write_constants(figures, "nccl" if args.fit == "collectives" else "runs")
    else:
        report(args.folder, constants)
        sanity(constants)
    return 0


if __name__ == "__main__":
    sys.exit(main())
