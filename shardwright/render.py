"""A Plan as people read it: drawn with rich, from the document alone, at any width from 80 columns up."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from .costmodel.stacks import OWN_STACK
from .plans.axes import names, role_of
from .plans.document import Considered, Mesh, Plan, SelfTest, ShardingProof, Stage
from .plans.order import num_activations, num_let_go
from .units import format_bytes, format_seconds

ZERO_MEANING = {
    0: "parameters, gradients and optimizer state whole on each data rank",
    1: "optimizer state sharded over the data axis",
    2: "optimizer state and gradients sharded over the data axis",
    3: "parameters, gradients and optimizer state sharded over the data axis",
}
SCHEDULE_NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "interleaved 1F1B",
    "breadth_first": "breadth-first",
    "zb_h1": "ZB-H1",
    "zb_h2": "ZB-H2",
    "zb_v": "ZB-V",
    "v_half": "V-Half",
    "v_min": "V-Min",
    "dualpipe_v": "DualPipeV",
    "hanayo": "Hanayo",
    "chimera": "Chimera",
    "bitpipe": "BitPipe",
    "synthesized": "an order of its own",
}
MAX_STAGE_ROWS = 16
BAR_WIDTH = 24
_MEMORY_COLORS = ("blue", "cyan", "magenta", "yellow", "green", "red", "white")


def make_console(*, stderr: bool = False, file: TextIO | None = None, width: int | None = None) -> Console:
    """One console for all reports: no syntax highlighting of numbers; 100 columns where no terminal says otherwise."""
    stream = file if file is not None else (sys.stderr if stderr else sys.stdout)
    if width is None and not stream.isatty():
        import os

        width = int(os.environ.get("COLUMNS", 0)) or 100
    return Console(file=stream, width=width, highlight=False)


def make_table(*columns: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """right: columns of numbers, set to the right. whole: columns that are never wrapped (numbers never are)."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=column in right or column in whole, overflow="fold")
    return table


def print_plan(plan: Plan, *, top: int = 8, console: Console | None = None) -> None:
    (console or make_console()).print(render_plan(plan, top=top))


def render_plan(plan: Plan, *, top: int = 8) -> RenderableType:
    """top: how many runner-up plans to show."""
    parts: list[RenderableType] = [
        section(_title(plan), _headline(plan)),
        section("Mesh", _mesh(plan)),
        section("Stages", _stages(plan)),
        section("Memory of the worst rank", _memory(plan)),
    ]
    if plan.considered and top > 0:
        parts.append(section("Runner-up plans", _runners_up(plan, top)))
    if plan.conservative_ops:
        parts.append(section("Ops planned conservatively", _conservative_ops(plan)))
    parts.append(section("How far to trust this", _trust(plan)))
    return Group(*parts)


def section(title: str, body: RenderableType) -> RenderableType:
    return Group(Rule(Text(title, "bold"), align="left", style="dim"), Padding(body, (0, 0, 1, 1)))


def _title(plan: Plan) -> str:
    model = plan.workload.get("model") or plan.workload.get("name") or "model"
    return f"{model} on {plan.hardware.get('name', 'hardware')}"


def pairs(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def _headline(plan: Plan) -> RenderableType:
    predicted = plan.predicted
    step = Text.assemble(
        (format_seconds(predicted.step_s), "bold green"),
        f"   {predicted.tokens_per_s_per_device:,.0f} tokens/s per device   MFU {predicted.mfu:.1%}",
    )
    lost = Text(
        f"{format_seconds(predicted.exposed_comm_s)} of communication exposed "
        f"({_share(predicted.exposed_comm_s, predicted.step_s)}), pipeline bubble {predicted.bubble_fraction:.1%}"
    )
    size, count = plan.microbatch.size, plan.microbatch.count
    batch = (
        f"{count} microbatch{'es' if count != 1 else ''} of {size} sequence{'s' if size != 1 else ''} = {size * count}"
    )
    ranks = plan.mesh.shape.batch_ranks
    if ranks > 1:
        batch += f", {size // ranks} on each data rank"
    if seq_len := plan.workload.get("seq_len"):
        batch += f", {seq_len:,} tokens each"
    again, away = num_let_go(plan)
    single = f"of {num_activations(plan)} activations, each of one stage and microbatch"
    rows: list[tuple[str, RenderableType]] = [
        ("predicted step", step),
        ("lost to", lost),
        ("schedule", schedule_text(plan)),
        ("global batch", batch),
        ("ZeRO", _zero(plan)),
        ("recompute", ", ".join([*_recomputed(plan), *([f"{again} {single}"] if again else [])]) or "nothing"),
    ]
    if away:
        rows.append(("offload", f"{away} {single}"))
    if plan.memory_policy.optimizer_state == "host":
        rows.append(("optimizer", "stepped in host memory, with its state and what gradients add up to"))
    if plan.loss_over == "each" and count > 1:
        rows.append(("loss", "of each microbatch, averaged: it is neither a mean nor a sum over samples"))
    if plan.fusions:
        rows.append(("fused kernels", ", ".join(plan.fusions)))
    if plan.forced:
        rows.append(("forced", ", ".join(f"{key}={value}" for key, value in plan.forced.items())))
    return pairs(rows)


def _zero(plan: Plan) -> str:
    """Extents where they are narrower than the data axis: so many neighbouring ranks share one copy."""
    if not plan.zero_extents:
        return f"{plan.zero}: {ZERO_MEANING.get(plan.zero, '')}"
    copies = ", ".join(f"{kind} over {size}" for kind, size in plan.zero_extents.items())
    return f"{plan.zero}, each copy over so many of the {plan.mesh.shape.state_ranks} data ranks: {copies}"


def schedule_text(plan: Plan) -> str:
    if plan.mesh.pp == 1:
        return "no pipeline"
    text = SCHEDULE_NAMES.get(plan.schedule.name, plan.schedule.name)
    if plan.schedule.virtual_stages > 1:
        text += f", {plan.schedule.virtual_stages} virtual stages on each rank"
    return text


def _recomputed(plan: Plan) -> list[str]:
    """Segments, in every backward."""
    policy = plan.memory_policy
    if policy.recompute and {*policy.recompute.values(), *policy.instances.values()} == {"all"}:
        return ["every segment"]
    texts = policy.recomputed(plan.segments)
    return [name if text == "all" else f"{text} of {name}" for name, text in texts.items()]


def mesh_text(mesh: Mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in _wide(mesh).items()) or "one device"


def _mesh(plan: Plan) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row(
        mesh_text(plan.mesh), Text(f"{plan.mesh.num_devices} device{'s' if plan.mesh.num_devices != 1 else ''}", "dim")
    )
    for axis, size in _wide(plan.mesh).items():
        table.add_row(f"  {axis} = {size}", Text(_axis_meaning(plan, axis), "dim"))
    return table


def _wide(mesh: Mesh) -> dict[str, int]:
    """Axes wider than one, outermost first."""
    named = mesh.shape.named
    return {axis: size for axis in names() if (size := named[axis]) > 1}


def _axis_meaning(plan: Plan, axis: str) -> str:
    """What an axis splits, with its share where the plan says so."""
    split = split_text(plan, axis)
    meaning = role_of(axis).meaning
    return f"{meaning.partition(':')[0]}: {split}" if split else meaning


def split_text(plan: Plan, axis: str) -> str:
    shares = plan.predicted.split.get(axis, {})
    return " and ".join(f"{_percent(share)} of {kind}" for kind, share in shares.items()) + (" split" if shares else "")


def _percent(share: float) -> str:
    """All and nothing are said of all and nothing alone."""
    rounded = round(100 * share)
    if rounded == 100 and share < 1:
        return f"{share:.2%}" if share < 0.99995 else ">99.99%"
    return "<1%" if rounded == 0 and share > 0 else f"{rounded}%"


def _stages(plan: Plan) -> RenderableType:
    table = make_table(
        "stage", "pp rank", "segments", "ranks", "peak memory", right=("stage", "pp rank", "peak memory")
    )
    limit = plan.predicted.memory_limit_bytes
    peaks = plan.predicted.peak_bytes
    shown = _elide(range(len(plan.stages)), MAX_STAGE_ROWS)
    for index in shown:
        if index is None:
            table.add_row("...", "", "", "", "")
            continue
        stage = plan.stages[index]
        peak = peaks[index] if index < len(peaks) else None
        memory = Text("" if peak is None else format_bytes(peak))
        if peak is not None and limit and peak > 0.95 * limit:
            memory.stylize("yellow")
        table.add_row(
            str(index), str(_pipeline_rank(plan, stage)), _segment_text(plan, stage), _ranges(stage.ranks), memory
        )
    return table


def _pipeline_rank(plan: Plan, stage: Stage) -> int:
    return stage.ranks[0] // max(1, plan.mesh.num_devices // plan.mesh.pp)


def _segment_text(plan: Plan, stage: Stage) -> str:
    """'embed, block x8, head' where the plan names its instances, else their indices."""
    names = plan.segments
    if not names or max(stage.segments, default=-1) >= len(names):
        return f"{_ranges(stage.segments)} ({len(stage.segments)})"
    runs: list[tuple[str, int]] = []
    for index in stage.segments:
        if runs and runs[-1][0] == names[index]:
            runs[-1] = (names[index], runs[-1][1] + 1)
        else:
            runs.append((names[index], 1))
    if len(runs) > 6:  # alternating blocks: count each kind
        runs = list(Counter(names[index] for index in stage.segments).items())
    return ", ".join(name if count == 1 else f"{name} x{count}" for name, count in runs)


def _memory(plan: Plan) -> RenderableType:
    predicted = plan.predicted
    peak = max(predicted.peak_bytes, default=0)
    worst = predicted.peak_bytes.index(peak) if predicted.peak_bytes else 0
    where = f"stage {worst}"
    if worst < len(plan.stages) and plan.stages[worst].ranks:
        where += f", ranks {_ranges(plan.stages[worst].ranks)}"
    free, sure = predicted.memory_margin_bytes, predicted.memory_sure
    table = memory_table(predicted.memory, peak, predicted.memory_limit_bytes, free, sure)
    if predicted.host_bytes:
        share = f"of {format_bytes(predicted.host_limit_bytes)}" if predicted.host_limit_bytes else ""
        table.add_row("host memory", format_bytes(predicted.host_bytes), Text(share, "dim"))
    return Group(Text(where, "dim"), table)


def memory_table(
    memory: Mapping[str, int], peak: int, limit: int, kept_free: int = 0, memory_sure: float = 0.0
) -> Table:
    """Bytes by kind, their peak, and the margin to the limit where there is one. kept_free: of the limit, left to the
    prediction's error, which was no larger in memory_sure of runs."""
    whole = max(limit, peak, 1)
    parts = sorted(((name, size) for name, size in memory.items() if size > 0), key=lambda item: -item[1])
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for index, (name, size) in enumerate(parts):
        color = _MEMORY_COLORS[index % len(_MEMORY_COLORS)]
        table.add_row(name.replace("_", " ").removesuffix(" bytes"), format_bytes(size), _bar(size / whole, color))
    table.add_row(Text("peak", "bold"), Text(format_bytes(peak), "bold"), _bar(peak / whole, "bold"))
    if limit:
        margin = limit - kept_free - peak
        style = "green" if margin > 0.05 * limit else "yellow" if margin >= 0 else "bold red"
        table.add_row("limit", format_bytes(limit), "")
        if kept_free:
            why = f"{_share(kept_free, limit)} of the limit: {10 * memory_sure:.2g} of 10 runs took no more beyond"
            table.add_row("kept free", format_bytes(kept_free), Text(why, "dim"))
        table.add_row("margin", Text(format_bytes(margin), style), Text(_share(margin, limit) + " of the limit", style))
    return table


def _bar(fraction: float, style: str) -> Text:
    return Text("█" * max(1, round(BAR_WIDTH * min(fraction, 1.0))), style) if fraction > 0 else Text("")


def _runners_up(plan: Plan, top: int) -> RenderableType:
    table = make_table("mesh", "µbatch", "schedule", "ZeRO", "recomp.", "step", "peak", "why it lost",
                       right=("µbatch", "ZeRO", "step", "peak"))  # fmt: skip
    ranked = sorted(plan.considered, key=lambda c: (c.step_s is None, c.step_s or 0.0))
    for other in ranked[:top]:
        table.add_row(
            _mesh_text(other),
            _short_microbatch(other),
            _short_schedule(other.schedule),
            _short_zero(other),
            other.recompute,
            "" if other.step_s is None else format_seconds(other.step_s),
            "" if other.peak_bytes is None else format_bytes(other.peak_bytes),
            other.reason,
        )
    left = len(ranked) - top
    if left <= 0:
        return table
    return Group(table, Text(f"{left} more considered (--top N shows more, --json all)", "dim"))


def _short_microbatch(other: Considered) -> str:
    ranks = other.mesh.shape.batch_ranks
    return f"{other.microbatch // ranks} x {ranks}" if ranks > 1 else str(other.microbatch)


def _short_zero(other: Considered) -> str:
    """With the widths over which it is split, where those are not the whole data axis, and where its state is."""
    widths = list(dict.fromkeys(other.zero_extents.values()))
    text = f"{other.zero} over {'/'.join(map(str, widths))}" if widths else str(other.zero)
    return f"{text}, host" if other.optimizer_state == "host" else text


def _short_schedule(schedule: str) -> str:
    """'interleaved_1f1b x3' -> 'int. 1F1B x3'."""
    name, *chunks = schedule.split(" ", 1)
    return " ".join([SCHEDULE_NAMES.get(name, name).replace("interleaved", "int."), *chunks])


def _mesh_text(other: Considered) -> str:
    return " ".join(f"{axis}{size}" for axis, size in _wide(other.mesh).items()) or "1 device"


def _conservative_ops(plan: Plan) -> RenderableType:
    table = make_table("op", "cost", "where", right=("cost",))
    grouped: dict[tuple[str, str], tuple[int, float]] = {}
    for op in plan.conservative_ops:
        count, cost_s = grouped.get((op.op, op.source), (0, 0.0))
        grouped[op.op, op.source] = (count + 1, cost_s + op.cost_s)
    for (name, source), (count, cost_s) in sorted(grouped.items(), key=lambda item: -item[1][1])[:12]:
        table.add_row(name if count == 1 else f"{name} x{count}", format_seconds(cost_s), source or "(no source line)")
    return Group(Text("No sharding rule: replicated, or split over the batch only.", "dim"), table)


def _trust(plan: Plan) -> RenderableType:
    certificate, planning = plan.certificate, plan.planning_s
    if certificate.status == "optimal":
        proof = "proven optimal among what was searched, under this cost model"
    else:
        bound = format_seconds(certificate.lower_bound_s)
        proof = f"within {certificate.gap_fraction:.1%} of the best among what was searched (bound {bound})"
    other_s = max(0.0, planning.total - planning.capture - planning.solve)
    rows: list[tuple[str, RenderableType]] = [
        ("certificate", f"{certificate.status}: {proof}" if certificate.status != "optimal" else proof),
        *([("not searched", ", ".join(certificate.not_searched))] if certificate.not_searched else []),
        *([("placements", _sharding_proof(certificate.sharding))] if certificate.sharding else []),
        *([("self-test", _self_test(plan.self_test))] if plan.self_test and plan.self_test.status in _SAID else []),
        ("hardware figures", _sources(plan)),
        *([("step time", _range(plan))] if plan.predicted.step_range_s else []),
        *([("software stack", plan.stack)] if plan.stack != OWN_STACK else []),
        (
            "planning took",
            f"{format_seconds(planning.total)}: capture {format_seconds(planning.capture)}, "
            f"solve {format_seconds(planning.solve)}, other {format_seconds(other_s)}",
        ),
    ]
    return pairs(rows)


_SAID = ("passed", "skipped")


def _self_test(found: SelfTest) -> str:
    if found.status == "skipped":
        return f"skipped: {found.reason}"
    worst = f"{found.largest_difference:.0e}" if found.largest_difference else "0"
    return (
        f"the captured graph gives the model's loss, gradients, buffers and step ({found.dtype}, "
        f"{found.samples} samples, largest difference {worst}), in {format_seconds(found.seconds)}"
    )


def _range(plan: Plan) -> str:
    low, high = (format_seconds(seconds) for seconds in plan.predicted.step_range_s)
    runs = "published runs" if plan.stack == OWN_STACK else f"published runs of {plan.stack}"
    return f"{low} to {high}: as far off are eight of ten {runs}"


def _sharding_proof(proof: ShardingProof) -> str:
    if proof.status == "optimal":
        return f"proven the fastest on this mesh, in {format_seconds(proof.seconds)}"
    return f"within {proof.gap_fraction:.1%} of the fastest on this mesh, in {format_seconds(proof.seconds)}"


def _sources(plan: Plan) -> str:
    """'21 datasheet, 3 fitted' from the plan's record of where each figure is from, and what there is to say of it."""
    counts = {kind: count for kind, count in plan.hardware.get("sources", {}).items() if count}
    text = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "not recorded"
    return ". ".join([text, *plan.hardware.get("notes", [])])


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return ", ".join(texts) if len(texts) <= 4 else ", ".join([*texts[:3], f"... ({len(numbers)} in all)"])


def _elide(items: Sequence[int], most: int) -> list[int | None]:
    if len(items) <= most:
        return list(items)
    head = most - 3
    return [*items[:head], None, *items[-2:]]
