"""`explain`, `explain --why-not` and `diff` as people read them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .planner.report.diff import Difference
from .planner.report.explain import Explanation, Row
from .plans.document import Plan
from .reasons import WhyNot
from .render import make_console, make_table, mesh_text, pairs, section
from .units import format_bytes, format_seconds

MAX_OPS = 30
MAX_PLACEMENTS = 20
MAX_INSTANCES = 3


def print_explanation(
    plan: Plan, explained: Explanation, rows: Sequence[Row], *, whole: bool, console: Console | None = None
) -> None:
    """rows: those asked for. whole: all of them in program order, or those that take longest."""
    parts: list[RenderableType] = [section("Where a microbatch's time goes, on one rank", _totals(explained))]
    shown = list(rows) if whole else explained.heaviest(rows)[:MAX_OPS]
    title = f"{len(shown)} of {len(rows)} ops and tensors" + ("" if whole else ", the longest first (--all: every one)")
    parts.append(section(title, Group(*(_row(plan, row, len(explained.instances[row.segment])) for row in shown))))
    (console or make_console()).print(Group(*parts))


def _totals(explained: Explanation) -> Table:
    table = make_table("segment", "stands for", "compute", "collectives", right=("compute",), whole=("segment",))
    for name, sums in explained.totals().items():
        moves = [f"{kind} {format_seconds(seconds)}" for kind, seconds in sums.items() if kind != "compute"]
        once = explained.sums().get(name, {})
        moves += [f"{kind} {format_seconds(seconds)}, once a step" for kind, seconds in once.items()]
        instances = _instances(explained.instances[name])
        table.add_row(name, instances, format_seconds(sums.get("compute", 0.0)), "\n".join(moves))
    return table


def _instances(paths: Sequence[str]) -> str:
    known = [path for path in paths if path]
    if not known:
        return f"{len(paths)} place{'s' if len(paths) != 1 else ''} between blocks" if len(paths) > 1 else ""
    return known[0] if len(known) == 1 else f"{known[0]} to {known[-1]} ({len(known)})"


def _row(plan: Plan, row: Row, count: int) -> RenderableType:
    sizes = plan.mesh.shape
    places = "   ".join(f"{axis} {text}" for axis, text in row.placements.items() if sizes.size(axis) > 1)
    head = Text.assemble(
        (f"{format_seconds(row.seconds):>9}", "bold"),
        (f" x{count}  " if count > 1 else "  ", "dim"),
        (row.node, "bold cyan"),
        f"  {row.op}",
        (f"  {row.phase}", "dim"),
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(width=9)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    where = "  ".join(part for part in (row.module, _short(row.source)) if part)
    if where:
        table.add_row("", "module", where)
    table.add_row("", "placed", f"{places or 'one device'}   {format_bytes(row.local_bytes)} a rank")
    for collective in row.collectives:
        text = f"{collective.axis} {collective.kind} of {format_bytes(collective.full_bytes)}"
        table.add_row("", "moves", f"{text}, {format_seconds(collective.seconds)}")
    for collective in row.sums:
        text = f"{collective.axis} {collective.kind} of {format_bytes(collective.full_bytes)}"
        table.add_row("", "sums", f"{text}, {format_seconds(collective.seconds)}, once a step")
    if row.collectives and row.compute_s:
        table.add_row("", "computes", format_seconds(row.compute_s))
    return Group(head, table)


def _short(source: str) -> str:
    """The path from the package on, or relative to where the user stands."""
    path, colon, line = source.rpartition(":")
    if "site-packages" + os.sep in path:
        path = path.rsplit("site-packages" + os.sep, 1)[1]
    elif path.startswith(os.getcwd() + os.sep):
        path = os.path.relpath(path)
    return path + colon + line


def print_difference(difference: Difference, *, console: Console | None = None) -> None:
    (console or make_console()).print(render_difference(difference))


def render_difference(difference: Difference) -> RenderableType:
    parts = [section("Choices", _choices(difference)), section("Figures", _figures(difference))]
    if not difference.comparable:
        parts.append(Text(" the plans are of different models or shapes: their placements do not compare", "dim"))
    elif difference.placements:
        parts.append(section(f"{len(difference.placements)} placements differ", _placements(difference)))
    parts.append(section("What binds the second plan", Text(difference.binding)))
    return Group(*parts)


def _choices(difference: Difference) -> RenderableType:
    if not difference.choices:
        return Text("none differs")
    table = make_table("choice", "first", "second", whole=("choice",))
    for change in difference.choices:
        table.add_row(change.what, change.before or "-", change.after or "-")
    return table


def _figures(difference: Difference) -> RenderableType:
    table = make_table("", "first", "second", "change", right=("first", "second", "change"))
    table.add_row("step", *map(format_seconds, difference.step_s), _change(*difference.step_s), style="bold")
    for part, seconds in difference.time_s.items():
        table.add_row(f"  {part}", *map(format_seconds, seconds), _change(*seconds))
    table.add_row(
        "memory of the worst rank", *map(format_bytes, difference.peak_bytes), _change(*difference.peak_bytes)
    )
    for kind, sizes in ((kind, sizes) for kind, sizes in difference.memory_bytes.items() if any(sizes)):
        table.add_row(f"  {kind}", *map(format_bytes, sizes), _change(*sizes))
    return table


def _change(before: float, after: float) -> str:
    if before == after:
        return ""
    return f"{(after - before) / before:+.1%}" if before else "new"


def _placements(difference: Difference) -> RenderableType:
    table = make_table("segment", "op or tensor", "first", "second", whole=("segment",))
    for change in difference.placements[:MAX_PLACEMENTS]:
        table.add_row(change.segment, change.node, change.before or "-", change.after or "-")
    if len(difference.placements) > MAX_PLACEMENTS:
        table.add_row("...", f"and {len(difference.placements) - MAX_PLACEMENTS} more (--json: every one)", "", "")
    return table


def print_why_not(plan: Plan, answer: WhyNot, choices: Sequence[str], *, console: Console | None = None) -> None:
    console = console or make_console()
    asked = ", ".join(choices)
    if answer.refusal is not None:
        lines = [("what happens", answer.refusal.what), ("that means", answer.refusal.means)]
        lines.append(("would work", answer.refusal.works))
        console.print(section(f"Why not {asked}: it cannot be", pairs([(k, Text(v)) for k, v in lines if v])))
        return
    assert answer.plan is not None and answer.difference is not None
    before, after = answer.difference.step_s
    verdict = "nothing is lost by it" if after <= before else f"the step takes {after / before - 1:.1%} longer"
    console.print(
        section(
            f"Why not {asked}", Text(f"{verdict}; first: the plan on {mesh_text(plan.mesh)}, second: with that forced")
        )
    )
    console.print(render_difference(answer.difference))
