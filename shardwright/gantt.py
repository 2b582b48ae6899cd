"""A pipeline timeline as text in colour: one line for each rank, time from left to right.

An action is as wide as it is long and shows its kind and microbatch, F0 or W12, or its kind alone where that is too
wide. First chunks of a rank are bright, later ones dim.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from .costmodel.timeline import Timeline

COLORS = {"F": "blue", "B": "green", "I": "green", "W": "yellow", "R": "magenta"}
MEANINGS = {
    "F": "forward",
    "B": "backward",
    "I": "input gradients",
    "W": "weight gradients",
    "R": "recomputation",
}
IDLE = "."


def render_gantt(timeline: Timeline, width: int) -> RenderableType:
    """width: columns, labels included."""
    num_ranks = len(timeline.ranks)
    label_width = len(f"rank {num_ranks - 1} ")
    columns = max(1, width - label_width)
    lines = []
    for rank in range(num_ranks):
        line = Text(f"rank {rank}".ljust(label_width), no_wrap=True)
        for letter, style in _cells(timeline, rank, columns):
            line.append(letter, style)
        lines.append(line)
    end = f"{timeline.makespan_s:g}"
    scale = Text(" " * label_width + "0" + end.rjust(columns - 1), "dim", no_wrap=True)
    return Group(*lines, scale, _legend(timeline, label_width))


def _cells(timeline: Timeline, rank: int, columns: int) -> list[tuple[str, str]]:
    """(character, style) of each column."""
    cells = [(IDLE, "dim")] * columns
    per_s = columns / timeline.makespan_s if timeline.makespan_s else 0.0
    row = timeline.ranks[rank]
    first_stage = min((action.stage for action in row), default=0)
    for action, start_s, end_s in zip(row, timeline.starts[rank], timeline.ends[rank], strict=True):
        if action.kind not in MEANINGS:  # takes no time
            continue
        first, last = round(start_s * per_s), round(end_s * per_s)
        text = f"{action.kind}{action.microbatch}".ljust(last - first)
        if len(text) > last - first:
            text = action.kind * (last - first)
        style = _style(action.kind, bright=action.stage == first_stage)
        cells[first:last] = [(letter, style) for letter in text]
    return cells


def _style(kind: str, *, bright: bool) -> str:
    return f"black on bright_{COLORS[kind]}" if bright else f"white on {COLORS[kind]}"


def _legend(timeline: Timeline, label_width: int) -> Text:
    legend = Text(" " * label_width)
    drawn = {action.kind for row in timeline.ranks for action in row}
    for kind in (kind for kind in MEANINGS if kind in drawn):
        legend.append(kind, _style(kind, bright=True))
        legend.append(f" {MEANINGS[kind]}  ")
    return legend.append(f"{IDLE} idle")
