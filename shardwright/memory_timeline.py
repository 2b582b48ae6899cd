"""The memory timeline of a plan, and of a run beside it, as JSON or as one HTML page that needs nothing else.

Each rank has a chart of its bytes over the step, kinds stacked, and a table of its worst moment. Pages hold at most
POINTS moments of a rank, the worst of each span of time; JSON holds all.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .costmodel.ledger import RankLedger
from .costmodel.memory import ITEMS
from .costmodel.trace import MemorySample, Trace
from .errors import ExitCode, ShardwrightError
from .planner.report.timeline import memory_ledgers
from .plans.document import Plan
from .profiler.files import replace_text
from .units import format_bytes, format_seconds

POINTS = 400
WIDTH, HEIGHT, LEFT, BOTTOM = 880, 220, 70, 22  # of a chart, in pixels; margins for its numbers
COLOURS = {
    "parameters": "#3b6fb6", "optimizer": "#7aa6d8", "buffers": "#b9cde8", "communication": "#8d8d8d",
    "gradients": "#d98c3f", "gradient_buffers": "#efc08a", "gathered_parameters": "#5f9e6e", "activations": "#c2554d",
    "workspace": "#9a77b4", "reserve": "#d9d9d9",
}  # fmt: skip
SUFFIXES = (".html", ".json")


def check_suffix(path: str) -> None:
    if Path(path).suffix not in SUFFIXES:
        raise ShardwrightError(
            f"--memory-timeline {path}: its name ends in neither .html nor .json",
            means="the ending says what is written: a page, or the numbers",
            change="--memory-timeline",
            works="--memory-timeline memory.html",
        )


def predicted_ledgers(plan: Plan) -> list[RankLedger]:
    """Of each pipeline rank."""
    found = memory_ledgers(plan) if plan.predicted.stage_s else []
    if not found:
        raise ShardwrightError(
            "the plan does not say what its ranks hold over the step",
            means="it is from an earlier version, or was edited",
            change="make the plan again, or leave --memory-timeline out",
            works="shardwright plan MODEL --hardware NAME --memory-timeline memory.html",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    return found


def write_memory_timeline(path: str | Path, plan: Plan, measured: Trace | None = None) -> None:
    """A file that is there is replaced as a whole, or left. measured: of a run's last step."""
    predicted = predicted_ledgers(plan)
    text = _page(plan, predicted, measured) if Path(path).suffix == ".html" else _numbers(plan, predicted, measured)
    replace_text(Path(path), text)


def _numbers(plan: Plan, predicted: Sequence[RankLedger], measured: Trace | None) -> str:
    """Columns of equal length: times, and the bytes of each kind from each time on."""
    document: dict[str, Any] = {
        "model": plan.workload.get("model"),
        "hardware": plan.hardware.get("name"),
        "limit_bytes": plan.predicted.memory_limit_bytes,
        "step_s": plan.predicted.step_s,
        "predicted": [
            {
                "pipeline_rank": ledger.rank,
                "peak_bytes": ledger.peak_bytes,
                **_columns(ledger.samples),
                "activations": [asdict(held) for held in ledger.activations],
            }
            for ledger in predicted
        ],
    }
    if measured is not None:
        document["measured"] = [{"rank": rank, **_columns(rows)} for rank, rows in _by_rank(measured).items()]
    return json.dumps(document) + "\n"


def _columns(samples: Sequence[MemorySample]) -> dict[str, Any]:
    kinds = _kinds(samples)
    return {
        "at_s": [sample.at_s for sample in samples],
        "bytes": {kind: [sample.items.get(kind, 0) for sample in samples] for kind in kinds},
    }


def _kinds(samples: Sequence[MemorySample]) -> list[str]:
    """In the order of ITEMS, those that are ever there."""
    found = {kind for sample in samples for kind, size in sample.items.items() if size}
    return [*(kind for kind in ITEMS if kind in found), *sorted(found - set(ITEMS))]


def _by_rank(trace: Trace) -> dict[int, list[MemorySample]]:
    rows: dict[int, list[MemorySample]] = {}
    for sample in trace.memory:
        rows.setdefault(sample.rank, []).append(sample)
    return dict(sorted(rows.items()))


def thinned(samples: Sequence[MemorySample], points: int = POINTS) -> list[MemorySample]:
    """At most so many: of each span of time the moment of most bytes. The first and the last stay."""
    if len(samples) <= points:
        return list(samples)
    span = max(samples[-1].at_s, 1e-30) / (points - 2)
    worst: dict[int, MemorySample] = {}
    for sample in samples[1:-1]:
        place = int(sample.at_s / span)
        if place not in worst or sample.total_bytes > worst[place].total_bytes:
            worst[place] = sample
    return [samples[0], *(worst[place] for place in sorted(worst)), samples[-1]]


def _page(plan: Plan, predicted: Sequence[RankLedger], measured: Trace | None) -> str:
    limit = plan.predicted.memory_limit_bytes
    title = f"Memory of {plan.workload.get('model', 'the model')} on {plan.hardware.get('name', 'hardware')}"
    parts = [f"<h1>{html.escape(title)}</h1>", _legend()]
    for ledger in predicted:
        parts.append(_chart(f"Pipeline rank {ledger.rank}, predicted", ledger.samples, limit))
    for rank, samples in _by_rank(measured).items() if measured is not None else ():
        parts.append(_chart(f"Rank {rank}, measured", samples, 0))
    return _PAGE.replace("TITLE", html.escape(title)).replace("BODY", "\n".join(parts))


def _legend() -> str:
    items = (f'<span><i style="background:{c}"></i>{_words(kind)}</span>' for kind, c in COLOURS.items())
    return f'<p class="legend">{"".join(items)}</p>'


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _chart(title: str, samples: Sequence[MemorySample], limit: int) -> str:
    """An area for each kind, from one sample's time to the next, with the worst moment's table."""
    worst = max(samples, key=lambda sample: sample.total_bytes)
    shown = thinned(samples)
    end_s = max(shown[-1].at_s, 1e-30)
    top = max(worst.total_bytes, 1) * 1.08
    if 0 < limit <= 4 * top:
        top = max(top, limit * 1.04)

    def x(at_s: float) -> str:
        return f"{LEFT + at_s / end_s * (WIDTH - LEFT):.1f}"

    def y(size: float) -> str:
        return f"{(HEIGHT - BOTTOM) * (1 - size / top):.1f}"

    shapes, below = [], [0] * len(shown)
    for kind in _kinds(shown):
        above = [low + sample.items.get(kind, 0) for low, sample in zip(below, shown, strict=True)]
        path = "M" + "L".join([*_steps(shown, above, x, y), *reversed(_steps(shown, below, x, y))]) + "Z"
        shapes.append(f'<path fill="{COLOURS.get(kind, "#555")}" d="{path}"><title>{_words(kind)}</title></path>')
        below = above
    for size in (0.0, top / 2, top):
        label = f'<text x="{LEFT - 6}" y="{float(y(size)) + 4:.0f}" text-anchor="end">{format_bytes(size)}</text>'
        shapes.append(label)
    if 0 < limit <= top:
        shapes.append(f'<path class="limit" d="M{LEFT} {y(limit)}H{WIDTH}"/>')
        shapes.append(f'<text x="{WIDTH}" y="{float(y(limit)) - 4:.0f}" text-anchor="end">limit</text>')
    shapes.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">0</text>')
    shapes.append(f'<text x="{WIDTH}" y="{HEIGHT - 6}" text-anchor="end">{format_seconds(end_s)}</text>')
    rows = "".join(
        f"<tr><td>{_words(kind)}</td><td>{format_bytes(worst.items[kind])}</td></tr>"
        for kind in sorted(_kinds([worst]), key=lambda kind: -worst.items[kind])
    )
    when = f"peak {format_bytes(worst.total_bytes)} at {format_seconds(worst.at_s)}"
    if limit:
        when += f", limit {format_bytes(limit)}"
    return (
        f"<section><h2>{html.escape(title)}</h2><p>{when}</p>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(shapes)}</svg>'
        f"<table>{rows}</table></section>"
    )


def _steps(shown: Sequence[MemorySample], sizes: Sequence[int], x: Any, y: Any) -> list[str]:
    """Corners of a line that keeps each value until the next."""
    points = []
    for index, (sample, size) in enumerate(zip(shown, sizes, strict=True)):
        points.append(f"{x(sample.at_s)} {y(size)}")
        if index + 1 < len(shown):
            points.append(f"{x(shown[index + 1].at_s)} {y(size)}")
    return points


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
body{font:14px/1.45 system-ui,sans-serif;color:#222;background:#fff;max-width:960px;margin:24px auto;padding:0 16px}
h1{font-size:20px}h2{font-size:16px;margin:28px 0 0}p{margin:4px 0;color:#555}
svg{width:100%;height:auto;border-bottom:1px solid #ddd}svg text{font-size:11px;fill:#555}
.limit{stroke:#b00020;stroke-dasharray:5 4;fill:none}
.legend span{margin-right:14px;white-space:nowrap}
.legend i{display:inline-block;width:11px;height:11px;margin-right:4px}
table{border-collapse:collapse;margin-top:6px}td{padding:1px 14px 1px 0}td+td{text-align:right}
</style></head><body>
BODY
</body></html>
"""
