"""docs/models.md from the results of benchmarks/models.py."""

from __future__ import annotations

import importlib.metadata
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TextIO

LIKE = "the zoo's trial"
Layouts = dict[str, dict[str, str]]
OWN = "planner's choice"
LAYOUTS: Layouts = {
    OWN: {},
    "tp=2 dp=2": {"pp": "1", "tp": "2", "dp": "2", "prefer": "memory"},
    "tp=4": {"pp": "1", "tp": "4", "prefer": "memory"},
    "zero=3": {"pp": "1", "dp": "4", "zero": "3"},
}
PROCESSES = 4
FAMILY_LAYOUTS: Layouts = {
    OWN: {},
    "zero=3": {"pp": "1", "dp": "2", "zero": "3"},
    "tp=2": {"pp": "1", "tp": "2", "prefer": "memory"},
    "pp=2": {"pp": "2", "global_microbatch": "2"},
}
FAMILY_PROCESSES = 2

# of what was found where a model and its program do not agree
NOTES = {
    "family_electra_choices": "the gradient of `classifier.bias`, which is added to all choices alike, is zero but for "
    "rounding; every other gradient agrees to 1e-14",
}
REFUSED = "torch.export refuses it: "

Row = dict[str, Any]
Rows = Mapping[tuple[str, str], Row]


def write(rows: Rows, path: Path) -> None:
    names = sorted({name for name, _ in rows})
    causal = [n for n in names if n.startswith("causal_")]
    families = [n for n in names if n.startswith("family_")]
    others = [n for n in names if n not in {*causal, *families}]
    out = io.StringIO()
    print("# Models\n", file=out)
    print(
        f"Written by `benchmarks/models.py`: gloo processes on {os.cpu_count()} CPU cores. Every model is a tiny, "
        "randomly initialized version of its "
        "architecture; an empty cell was not run. A layout passes where loss and every gradient of two training steps "
        "in float64 agree to 1e-9 with the model as written on one process. Beside a tensor layout stands the share of "
        "parameters that it splits; one without a share was measured before placements were asked to split all that "
        "can be split (`--force prefer=memory`), and may keep every parameter whole.\n",
        file=out,
    )
    _group("Causal language models (four processes)", causal, LAYOUTS, rows, out)
    _group("Encoders, encoder-decoders, vision, audio, state spaces (four processes)", others, LAYOUTS, rows, out)
    title = "Speech, vision, multimodal, diffusion, recommendation, graphs, time series (two processes)"
    _group(title, families, FAMILY_LAYOUTS, rows, out)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(out.getvalue())
    temporary.replace(path)


_BEFORE_ROWS_SAID = "2026-11-21, torch 2.13.0, transformers 5.23.0"


def measured() -> str:
    """The day and the releases, for a row."""
    versions = (f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in ("torch", "transformers"))
    return ", ".join((str(date.today()), *versions))


def is_left_out(name: str, rows: Rows) -> bool:
    """Models of other fields are tried too where torch.export alone refuses them."""
    why = rows.get((name, LIKE), {}).get("why", "")
    return bool(why) and not (name.startswith("family_") and why.startswith(REFUSED))


def _group(title: str, members: Sequence[str], layouts: Layouts, rows: Rows, out: TextIO) -> None:
    days = sorted(
        {row.get("measured", _BEFORE_ROWS_SAID) for (n, layout), row in rows.items() if n in members and layout != LIKE}
    )
    counted = [n for n in members if not rows.get((n, LIKE), {}).get("why")]
    print(f"## {title}\n", file=out)
    print(f"Measured on {'; '.join(days)}.\n", file=out)
    print(f"{len(members)} tried, of which {len(counted)} run as written and are taken by `torch.export`.\n", file=out)
    more = [n for n in members if n not in counted and not is_left_out(n, rows)]
    if more:
        good = sum(all(rows.get((n, layout), {}).get("ok") for layout in layouts) for n in more)
        print(f"{len(more)} more are refused by `torch.export` alone, but not by Shardwright, which answers", file=out)
        print(
            f"their questions about the batch. {good} of them are equal under all of the layouts. They count", file=out
        )
        print("in no row of the table.\n", file=out)
    print("| | of those | share |\n| --- | --- | --- |", file=out)
    planned = [n for n in counted if any(rows.get((n, layout), {}).get("planned") for layout in layouts)]
    print(f"| planned | {len(planned)} | {_share(len(planned), len(counted))} |", file=out)
    for layout in layouts:
        good = [n for n in counted if rows.get((n, layout), {}).get("ok")]
        print(f"| checked, {layout} | {len(good)} | {_share(len(good), len(counted))} |", file=out)
    everywhere = [n for n in counted if all(rows.get((n, layout), {}).get("ok") for layout in layouts)]
    print(f"| checked, all of these | {len(everywhere)} | {_share(len(everywhere), len(counted))} |", file=out)
    slowest = max((row["plan_s"] for (n, _), row in rows.items() if n in counted and "plan_s" in row), default=None)
    if slowest is not None:
        empty = any((n, layout) not in rows for n in counted for layout in layouts)
        said = " An empty cell was not run, and counts in no row as passed." if empty else ""
        print(f"\nThe longest of their plans took {slowest:.0f} s of one core.{said}", file=out)
    print(f"\n| model | {' | '.join(layouts)} | remarks |\n| --- |{' --- |' * (len(layouts) + 1)}", file=out)
    for name in members:
        print(_line(name, layouts, rows), file=out)
    print(file=out)


def _line(name: str, layouts: Layouts, rows: Rows) -> str:
    left_out = rows.get((name, LIKE), {}).get("why", "")
    cells = ["" if is_left_out(name, rows) else _cell(rows.get((name, layout))) for layout in layouts]
    reasons = Counter(rows[(name, layout)]["why"] for layout in layouts if rows.get((name, layout), {}).get("why"))
    noted = [NOTES[name]] if reasons and name in NOTES else []
    remarks = "; ".join([left_out] * bool(left_out) + list(reasons) + noted)
    clean = remarks.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
    shown = name.removeprefix("causal_").removeprefix("family_").replace("__", "-")
    return f"| {shown} | {' | '.join(cells)} | {clean} |"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.get("ok") and row.get("split") and "tp" in row["layout"]:
        return f"yes, {row['split']['parameters']:.0%}"
    return "yes" if row.get("ok") else "planned" if row.get("planned") and "why" not in row else "no"
