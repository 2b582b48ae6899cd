"""Does a training job fit, how much larger could it be, and how few devices would hold it?

Every answer is a plan that the planner made: the largest value that is reported was planned and fits, the next one that
is reported was planned and does not. In between nothing is asked, as more never needs less. A largest value is looked
for by doubling until a plan fails (by more where little of the memory is used), then by halving the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import ShardwrightError
from .probing import OutOfTime, Prober, Size, Verdict
from .profiler.accelerators import accelerators
from .profiler.cluster import Cluster
from .profiler.hardware import parse_hardware

MOST_SEQUENCES = 1 << 16  # of a microbatch
MOST_TOKENS = 1 << 22  # of a sequence
LENGTH_STEPS, BATCH_STEPS = 16, 64  # a value is found to this share of the power of two below it
MOST_GROWTH = 32  # from one value to the next
FEW = 8  # counts of devices that are all tried, rather than by halving the gap


@dataclass(frozen=True)
class Largest:
    """value: planned, and fits; 0: not even one does. beyond: planned, and does not; None: none was found up to the
    most that is looked at, or time was up."""

    value: int
    verdict: Verdict | None
    beyond: int | None
    beyond_verdict: Verdict | None
    out_of_time: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "plan": self.verdict.to_dict() if self.verdict else None,
            "beyond": self.beyond,
            "beyond_reason": self.beyond_verdict.reason if self.beyond_verdict else "",
            "out_of_time": self.out_of_time,
        }


def largest(
    probe: Callable[[int], Verdict],
    start: int,
    most: int,
    *,
    grain: Callable[[int], int] = lambda value: 1,
    known: Verdict | None = None,
    near: bool = False,
) -> Largest:
    """Doubling from start, or halving where that does not fit, then bisection to grain(value). known: of start. near:
    the answer is expected right above start, so that the steps double in place of the value."""
    low, high = 0, most + 1  # the greatest that fits, the least that does not
    held: dict[int, Verdict] = {} if known is None else {start: known}
    value = start
    try:
        while low < most and high - low > max(1, grain(max(low, 1))):
            if value not in held:
                held[value] = probe(value)
            if held[value].fits:
                low = value
            else:
                high = value
            if high > most:
                value = min(2 * low - start + 1 if near else low * _growth(held[low]), most)
            elif low == 0:
                value = high // 2
            else:
                step = max(1, grain(low))
                value = max((low + high) // 2 // step * step, low // step * step + step)
            if value >= high or value <= low:
                break
    except OutOfTime:
        return Largest(low, held.get(low), high if high in held else None, held.get(high), True)
    return Largest(low, held.get(low), high if high in held else None, held.get(high))


def _growth(verdict: Verdict) -> int:
    """Into half of what is free: activations grow in proportion, or nearly so, and the rest does not grow."""
    growing = verdict.memory.get("activations", 0) + verdict.memory.get("workspace", 0)
    return max(2, min(MOST_GROWTH, verdict.margin_bytes // (2 * growing))) if growing else MOST_GROWTH


def _grain(value: int, steps: int) -> int:
    return max(1, (1 << (value.bit_length() - 1)) // steps)


def _length_grain(tokens: int) -> int:
    return _grain(tokens, LENGTH_STEPS)


def _batch_grain(samples: int) -> int:
    return _grain(samples, BATCH_STEPS)


@dataclass
class Answer:
    """What `shardwright fits` says. Questions that were not asked, or have no answer, are in notes."""

    verdict: Verdict
    global_batch: int
    seq_len: int | None
    microbatch: Largest | None = None
    single_batch: Largest | None = None  # samples of a step without accumulation
    sequence: Largest | None = None
    notes: list[str] = field(default_factory=list)
    num_plans: int = 0

    def to_dict(self) -> dict[str, Any]:
        def given(found: Largest | None) -> dict[str, Any] | None:
            return found.to_dict() if found is not None else None

        return {
            "fits": self.verdict.fits,
            "global_batch": self.global_batch,
            "seq_len": self.seq_len,
            **{key: value for key, value in self.verdict.to_dict().items() if key != "fits"},
            "largest_microbatch": given(self.microbatch),
            "largest_batch_without_accumulation": given(self.single_batch),
            "longest_sequence": given(self.sequence),
            "notes": self.notes,
            "num_plans": self.num_plans,
        }


def answer(prober: Prober, cluster: Cluster, global_batch: int, seq_len: int | None, *, search: bool = True) -> Answer:
    """search: also look for the largest sizes that fit. Raises ShardwrightError where the job cannot be planned."""
    verdict = prober.job(cluster, Size(global_batch, seq_len))
    own = prober.workload(seq_len).spec.get("seq_len")
    found = Answer(verdict, global_batch, own if isinstance(own, int) else None)
    if search:
        _ask_batches(prober, cluster, seq_len, found)
        _ask_length(prober, cluster, seq_len, found)
    found.num_plans = prober.num_plans
    return found


def _ask_batches(prober: Prober, cluster: Cluster, seq_len: int | None, found: Answer) -> None:
    if prober.forced.microbatch is not None or prober.forced.global_microbatch is not None:
        found.notes.append("the microbatch is forced: no larger one was looked for")
        return

    def microbatch(value: int) -> Verdict:
        prober.say(f"microbatch of {value:,}")
        force = (("microbatch", str(value)),)  # two microbatches for each device: any data-parallel degree accumulates
        return prober.verdict(cluster, Size(2 * value * cluster.num_devices, seq_len, force=force))

    first = max(1, found.verdict.microbatch // found.verdict.batch_ranks) if found.verdict.fits else 1
    found.microbatch = by_rank = largest(microbatch, first, MOST_SEQUENCES, grain=_batch_grain)
    if by_rank.verdict is None:
        return
    ranks = by_rank.verdict.batch_ranks

    def single(value: int) -> Verdict:
        samples = value * ranks
        prober.say(f"batch of {samples:,} in one microbatch")
        return prober.verdict(cluster, Size(samples, seq_len, force=(("global_microbatch", str(samples)),)))

    once = Largest(0, None, None, None, True)
    if not by_rank.out_of_time:
        once = largest(single, by_rank.value, MOST_SEQUENCES, grain=_batch_grain, near=True)
    beyond = None if once.beyond is None else once.beyond * ranks
    found.single_batch = Largest(once.value * ranks, once.verdict, beyond, once.beyond_verdict, once.out_of_time)


def _ask_length(prober: Prober, cluster: Cluster, seq_len: int | None, found: Answer) -> None:
    if found.seq_len is None:
        found.notes.append("the length of the model's sequence is not for --seq-len to change: no other was looked for")
        return

    def length(value: int) -> Verdict:
        if value == found.seq_len:
            return found.verdict
        refused = prober.refusal(value)
        if refused is not None:
            return refused
        prober.say(f"{value:,} tokens")
        return prober.verdict(cluster, Size(found.global_batch, value))

    found.sequence = largest(length, found.seq_len, MOST_TOKENS, grain=_length_grain, known=found.verdict)


@dataclass(frozen=True)
class Grid:
    """verdicts[row][column] of seq_lens x batches (sequences on each data rank); None: not planned, as the smaller
    batch does not fit or time was up."""

    title: str
    seq_lens: Sequence[int | None]
    batches: Sequence[int]
    verdicts: list[list[Verdict | None]]
    out_of_time: bool = False

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {"seq_len": length, "batch": batch, "fits": verdict.fits, "peak_bytes": verdict.peak_bytes,
             "limit_bytes": verdict.limit_bytes, "recomputes": verdict.recomputes, "reason": verdict.reason}
            for length, row in zip(self.seq_lens, self.verdicts, strict=True)
            for batch, verdict in zip(self.batches, row, strict=True)
            if verdict is not None
        ]  # fmt: skip
        return {"trained": self.title, "cells": rows, "out_of_time": self.out_of_time}


def grid(
    prober: Prober, cluster: Cluster, seq_lens: Sequence[int | None], batches: Sequence[int], *, lora: bool
) -> Grid:
    """A row ends with the first batch that does not fit."""
    found = Grid("LoRA" if lora else "all parameters", seq_lens, batches, [[None for _ in batches] for _ in seq_lens])
    try:
        for row, length in zip(found.verdicts, seq_lens, strict=True):
            refused = prober.refusal(length) if length is not None else None
            for column, batch in enumerate(batches):
                prober.say(f"{found.title}: {batch:,} sequences" + (f" of {length:,} tokens" if length else ""))
                row[column] = refused or prober.verdict(cluster, _cell(cluster, length, batch, lora))
                if not row[column].fits:  # type: ignore[union-attr]
                    break
    except OutOfTime:
        return Grid(found.title, seq_lens, batches, found.verdicts, True)
    return found


def _cell(cluster: Cluster, length: int | None, batch: int, lora: bool) -> Size:
    return Size(batch * cluster.num_devices, length, lora, (("microbatch", str(batch)),))


@dataclass(frozen=True)
class Fewest:
    """hardware: the least that holds the job, '' where none does. without: what was planned and does not, by number of
    devices."""

    hardware: str
    num_devices: int
    verdict: Verdict | None
    without: dict[str, Verdict]
    global_batch: int
    out_of_time: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "hardware": self.hardware or None,
            "num_devices": self.num_devices,
            "global_batch": self.global_batch,
            "plan": self.verdict.to_dict() if self.verdict else None,
            "does_not_fit": {name: verdict.reason for name, verdict in self.without.items()},
            "out_of_time": self.out_of_time,
        }


def fewest(prober: Prober, cluster: Cluster, global_batch: int | None, seq_len: int | None, most: int) -> Fewest:
    """global_batch: one sequence for each device where None. Raises ShardwrightError where `cluster` is no row of like
    nodes."""
    names = _sizes(cluster, most)
    counts = sorted(names)
    held: dict[int, Verdict] = {}

    def batch(count: int) -> int:
        return count if global_batch is None else global_batch

    def fits(count: int) -> bool:
        if count not in held:
            prober.say(names[count])
            held[count] = prober.verdict(parse_hardware(names[count]), Size(batch(count), seq_len))
        return held[count].fits

    out_of_time, low, high = False, 0, None
    try:
        for count in _doubling(counts):
            if fits(count):
                high = count
                break
            low = count
        if high is not None:
            high = _least_between([count for count in counts if low < count < high], fits, high)
    except OutOfTime:
        out_of_time = True
    without = {names[count]: verdict for count, verdict in sorted(held.items()) if not verdict.fits}
    best = min((count for count, verdict in held.items() if verdict.fits), default=0)
    return Fewest(names.get(best, ""), best, held.get(best), without, batch(best), out_of_time)


def _doubling(counts: Sequence[int]) -> list[int]:
    """Each at least twice the one before, and the last."""
    chosen: list[int] = []
    for count in counts:
        if not chosen or count >= 2 * chosen[-1] or count == counts[-1]:
            chosen.append(count)
    return chosen


def _least_between(between: Sequence[int], fits: Callable[[int], bool], high: int) -> int:
    """Of counts between one that does not fit and `high`, which does. A few are all tried, as a count may fail alone
    for what does not divide."""
    if len(between) <= FEW:
        return next((count for count in between if fits(count)), high)
    middle = len(between) // 2
    if fits(between[middle]):
        return _least_between(between[:middle], fits, between[middle])
    return _least_between(between[middle + 1 :], fits, high)


def _sizes(cluster: Cluster, most: int) -> dict[int, str]:
    """Number of devices -> name: within one node every number, then whole nodes."""
    if len(cluster.groups) != 1 or cluster.host_pairs:
        raise _no_node(cluster)
    group = cluster.groups[0]
    if group.device.kind == "cpu":
        return {count: f"{count}xCPU" for count in range(1, most + 1)}
    entry = accelerators().get(group.device.name)
    if entry is None:
        raise _no_node(cluster)
    name = entry.key
    node = group.devices_per_host if group.devices_per_host > 1 else entry.host_devices or 1
    sizes = {count: f"1x{count}x{name}" for count in range(1, min(node, most) + 1)}
    return sizes | {nodes * node: f"{nodes}x{node}x{name}" for nodes in range(2, most // node + 1)}


def _no_node(cluster: Cluster) -> ShardwrightError:
    return ShardwrightError(
        f"--fewest: {cluster.name} is no kind of node of the catalog",
        means="numbers of like devices are counted up, node by node",
        change="--hardware",
        works="--hardware 1x8xH100-SXM-80GB",
    )
