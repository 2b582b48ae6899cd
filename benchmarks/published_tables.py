"""Predictions of published rows as tables in Markdown."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from published_rows import Row
from published_statistics import Judged, choices, fit_of, quantile, time_errors


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
        table(
            ("source", "rows", "median error", "90th percentile", "predicted / measured"),
            [
                (name, errors.rows, _percent(errors.median), _percent(errors.p90), f"{errors.bias:.3f}")
                for name, errors in ((name, time_errors(here)) for name, here in sources.items())
                if errors.rows
            ],
        ),
        "\n## Order within a model and number of GPUs\n",
        table(
            ("source", "groups", "rank correlation, median", "least", "regret, mean", "most"),
            [line for name, here in sources.items() for line in _choice_line(name, here)],
        ),
        "\n## Memory\n",
        table(
            ("source", "rows", "median error", "90th percentile", "predicted / published", "ran out", "recall",
             "ran", "false alarms"),
            [line for name, here in sources.items() for line in _memory_line(name, here)],
        ),
        "\n## Memory by stack\n",
        table(("stack", "rows", "measured / predicted, median", "80th percentile", "most"), _memory_by_stack(judged)),
        "\n## Rows left out\n",
        table(("source", "rows", "reason"), _left_out(judged, rows)),
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


def _memory_by_stack(judged: Sequence[Judged]) -> list[tuple[object, ...]]:
    """The 80th percentile, less 1, is memory_error of costmodel/stacks.toml; that of all rows, of constants.toml."""
    found: dict[str, list[float]] = {}
    for one in judged:
        if one.memory_ratio is not None and one.row.quiet:
            for name in (one.row.stack, "all"):
                found.setdefault(name, []).append(1 / one.memory_ratio)
    return [
        (name, len(ratios), *(_number(quantile(ratios, share)) for share in (0.5, 0.8, 1.0)))
        for name, ratios in sorted(found.items())
    ]


def _left_out(judged: Sequence[Judged], rows: Sequence[Row]) -> list[tuple[object, ...]]:
    counted = Counter((row.source, reason) for row in rows for reason in row.left_out)
    counted.update((one.row.source, f"refused: {one.found.error}"[:90]) for one in judged if one.found.error)
    return [(source, number, reason) for (source, reason), number in sorted(counted.items())]


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    out = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*out, *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def worst(judged: Sequence[Judged], count: int) -> str:
    timed = [one for one in judged if one.ratio is not None and one.row.quiet]
    timed.sort(key=lambda one: abs(math.log(one.ratio or 1.0)), reverse=True)
    return table(
        ("source", "row", "model", "GPUs", "layout", "measured s", "predicted s", "ratio", "unlike"),
        [
            (one.row.source, one.row.number, one.row.name, one.row.num_gpus, one.row.layout,
             f"{one.row.measured_s:.3f}", f"{one.found.step_s:.3f}", f"{one.ratio:.2f}", "; ".join(one.row.unlike))
            for one in timed[:count]
        ],
    )  # fmt: skip
