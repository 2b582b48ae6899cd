"""What `shardwright fits` found, as people read it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from .fits import Answer, Fewest, Grid, Largest
from .probing import Verdict
from .profiler.cluster import Cluster
from .render import make_console, make_table, memory_table, pairs, section
from .units import format_bytes, format_seconds


def print_answer(found: Answer, model: str, cluster: Cluster, console: Console | None = None) -> None:
    parts = [section(f"{model} on {cluster.name}", _headline(found))]
    if found.verdict.memory:
        verdict = found.verdict
        title = (
            "Memory of the worst rank" if verdict.fits else "Memory of the worst rank, of the plan that comes nearest"
        )
        parts.append(section(title, _memory(verdict)))
    sizes = _sizes(found)
    if sizes or found.notes:
        rows: list[RenderableType] = [pairs(sizes)] if sizes else []
        parts.append(section("What still fits", Group(*rows, *(Text(note, "dim") for note in found.notes))))
    (console or make_console()).print(Group(*parts, Text(f"{found.num_plans} plans made", "dim")))


def _headline(found: Answer) -> RenderableType:
    verdict = found.verdict
    job = _samples(found.global_batch) + (f", {found.seq_len:,} tokens each" if found.seq_len else "")
    rows: list[tuple[str, RenderableType]] = [("fits", _yes_or_no(verdict)), ("job", job), ("plan", verdict.plan)]
    if verdict.host_bytes:
        rows.append(("host memory", format_bytes(verdict.host_bytes)))
    if verdict.step_s is not None:
        rows.append(("predicted step", format_seconds(verdict.step_s)))
    return pairs(rows)


def _memory(verdict: Verdict) -> RenderableType:
    whole = verdict.limit_bytes + verdict.kept_free_bytes
    return memory_table(verdict.memory, verdict.peak_bytes, whole, verdict.kept_free_bytes, verdict.memory_sure)


def _samples(count: int) -> str:
    return f"{count:,} sample{'s' if count != 1 else ''} a step"


def _yes_or_no(verdict: Verdict) -> Text:
    of = f"{format_bytes(verdict.peak_bytes)} of {format_bytes(verdict.limit_bytes)}"
    if verdict.fits:
        return Text.assemble(("yes", "bold green"), f"   {of}, {format_bytes(verdict.margin_bytes)} left")
    return Text.assemble(("no", "bold red"), f"   {of if verdict.peak_bytes else ''}, {verdict.reason}")


def _sizes(found: Answer) -> list[tuple[str, RenderableType]]:
    ranks = found.microbatch.verdict.batch_ranks if found.microbatch and found.microbatch.verdict else 1
    each = "sequences" if found.seq_len else "samples"
    of_rank = f"{each} on each of {ranks} data ranks" if ranks > 1 else each
    rows = (
        ("largest microbatch", found.microbatch, f"{of_rank}, gradients accumulated over any number"),
        ("largest batch in one", found.single_batch, f"{each} in one microbatch"),
        ("longest sequence", found.sequence, f"tokens, at a batch of {found.global_batch:,}"),
    )
    return [(name, _largest(size, unit)) for name, size, unit in rows if size is not None]


def _largest(size: Largest, unit: str) -> str:
    if size.verdict is None:
        return "not found before the time limit" if size.out_of_time else "none fits"
    text = f"{size.value:,} {unit}: {format_bytes(size.verdict.peak_bytes)}"
    if size.verdict.recomputes:
        text += " with recomputation"
    if size.verdict.host_bytes:
        text += f" and {format_bytes(size.verdict.host_bytes)} of host memory"
    if size.beyond is None:
        return text + ("; time was up before a larger one failed" if size.out_of_time else "; no larger one was tried")
    reason = size.beyond_verdict.reason if size.beyond_verdict else ""
    return f"{text}; {size.beyond:,} does not fit ({reason})" + ("; time was up" if size.out_of_time else "")


def print_grids(
    grids: Sequence[Grid], no_lora: str, model: str, cluster: Cluster, console: Console | None = None
) -> None:
    parts = [section(f"{model} on {cluster.name}: {one.title} trained", _grid(one)) for one in grids]
    legend = "peak of the worst rank; r: with recomputation; h: state in host memory; no: does not fit; "
    legend += "-: a smaller batch does not"
    if any(one.out_of_time for one in grids):
        legend += ", or time was up"
    notes = [Text(legend, "dim")] + ([Text(f"no LoRA: {no_lora}", "dim")] if no_lora else [])
    (console or make_console()).print(Group(*parts, *notes))


def _grid(one: Grid) -> RenderableType:
    batches = [f"batch {batch:,}" for batch in one.batches]
    table = make_table("tokens", *batches, right=("tokens", *batches))
    for length, row in zip(one.seq_lens, one.verdicts, strict=True):
        table.add_row("own" if length is None else f"{length:,}", *map(_cell, row))
    limits = {verdict.limit_bytes for row in one.verdicts for verdict in row if verdict is not None}
    return Group(table, Text(f"limit {format_bytes(max(limits, default=0))}", "dim"))


def _cell(verdict: Verdict | None) -> Text:
    if verdict is None:
        return Text("-", "dim")
    if not verdict.fits:
        return Text("no", "red")
    marks = (" r" if verdict.recomputes else "") + (" h" if verdict.host_bytes else "")
    return Text(format_bytes(verdict.peak_bytes) + marks, "green")


def print_fewest(found: Fewest, model: str, console: Console | None = None) -> None:
    rows: list[tuple[str, RenderableType]] = []
    if found.verdict is not None:
        devices = f"{found.num_devices} device{'s' if found.num_devices != 1 else ''}"
        rows += [
            ("fewest", Text(f"{devices}: {found.hardware}", "bold green")),
            ("memory", _yes_or_no(found.verdict)),
            ("job", _samples(found.global_batch)),
            ("plan", found.verdict.plan),
        ]
    else:
        rows.append(("fewest", Text("none of those tried", "bold red")))
    rows += [("does not fit", f"{name}: {verdict.reason}") for name, verdict in found.without.items()]
    if found.out_of_time:
        rows.append(("", "time was up before all were tried"))
    (console or make_console()).print(section(f"fewest devices for {model}", pairs(rows)))
