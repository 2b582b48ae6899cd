"""docs/validation.md: what published runs say of the planner's predictions, by source and row by row."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

from published_rows import Row
from published_statistics import Judged
from published_tables import table, tables, worst

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "validation.md"
RESULTS = ROOT / "benchmarks" / "results" / "published.md"
CALIBRATION = ROOT / "benchmarks" / "results" / "calibration.md"
# Sources whose rows stand in the page one by one.
ONE_BY_ONE = {
    "megatron_lm_readme_tables": "Megatron-LM, 1.7B to 1T (SC21, table 1, and the tables before it)",
    "paper_korthikanti_recompute": "Recomputation study (arXiv:2205.05198, table 5)",
    "paper_llama3_405b": "Llama 3 405B (arXiv:2407.21783, table 4)",
    "paper_zero_bubble": "Zero Bubble (arXiv:2401.10241)",
    "torchtitan": "torchtitan on H100 of 500 W",
}
INTRO = """# Predictions beside published runs

Written by `benchmarks/published.py --data FOLDER --write`; the runs themselves are not in the repository. Each row's
model is captured as a transformers configuration of its sizes, the row's layout is forced, and the step time and
memory are those of the search's own evaluation, for the software stack that the row ran on
([costmodel.md](costmodel.md#software-stacks)). A row that does not fit, as predicted, is timed on devices with more
memory.

Errors are |predicted / measured - 1|. Regret is how much slower, as measured, the layout is that is predicted the
fastest of a group (one model on so many GPUs) than the fastest measured one. Recall is the share of runs that ran
out of memory, or failed, which are said not to fit; a false alarm is a run that ran and is said not to fit."""


def validation(judged: Sequence[Judged], rows: Sequence[Row]) -> str:
    parts = [INTRO, f"{len(judged)} rows, {datetime.date.today():%Y-%m}.", tables(judged, rows).rstrip()]
    if CALIBRATION.is_file():
        parts += ["## Rows that a fit did not see", CALIBRATION.read_text().split("\n", 2)[2].strip()]
    parts += ["## Row by row"]
    for source, title in ONE_BY_ONE.items():
        mine = [one for one in judged if one.row.source == source and one.ratio is not None]
        if mine:
            parts += [f"### {title}", _row_by_row(mine)]
    parts += ["## Predicted worst", worst(judged, 25)]
    return "\n\n".join(parts) + "\n"


def _row_by_row(judged: Iterable[Judged]) -> str:
    lines = []
    for one in sorted(judged, key=lambda one: one.row.number):
        row, found = one.row, one.found
        memory = f"{row.measured_gib:.0f}" if row.measured_gib else ""
        peak = f"{found.peak_gib:.0f}" + ("" if found.fits else ", does not fit") if found.peak_gib else ""
        lines.append(
            (row.name, row.num_gpus, short_layout(row), f"{row.measured_s:.2f}", f"{found.step_s:.2f}",
             f"{one.ratio:.2f}", memory, peak)
        )  # fmt: skip
    head = ("model", "GPUs", "layout", "measured s", "predicted s", "ratio", "published GiB", "predicted GiB")
    return table(head, lines)


def short_layout(row: Row) -> str:
    """What was forced, without what is as everywhere."""
    usual = {"pp": "1", "dp": "1", "tp": "1", "zero": "0", "optimizer_state": "device", "recompute": "none"}
    kept = {k: v for k, v in row.force.items() if v != usual.get(k) and k not in ("optimizer_state", "zero_extent")}
    return " ".join(f"{key}={value}" for key, value in kept.items())


def write(judged: Sequence[Judged], rows: Sequence[Row]) -> None:
    PAGE.write_text(validation(judged, rows))
    RESULTS.write_text(f"# Published training runs\n\n{tables(judged, rows)}\n\n{worst(judged, 100)}\n")
