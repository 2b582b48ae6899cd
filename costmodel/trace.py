"""Trace: what happened when, on which resource of which rank. One format for predicted and for measured timelines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..profiler.files import replace_text

COMPUTE = "compute"  # the rank's compute stream
COLLECTIVE = "collective"  # its data-parallel collectives
SEND = "send"  # point-to-point transfers that leave it, one lane for each peer: 'send:3'
HOST_OUT, HOST_IN = "host:out", "host:in"  # copies of activations to host memory and back

_COLOURS = {"F": "good", "B": "bad", "I": "terrible", "W": "yellow", "R": "grey"}


@dataclass(frozen=True)
class Event:
    """kind: F, B, I, W, R, O, L, send, gather, reduce, offload, load, optimizer. stage and microbatch are -1 where
    they mean nothing."""

    rank: int
    resource: str
    kind: str
    stage: int
    microbatch: int
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def label(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}" if self.microbatch >= 0 else self.kind


@dataclass(frozen=True)
class MemorySample:
    """Bytes of a rank by kind, from this time on until the rank's next sample."""

    rank: int
    at_s: float
    items: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True)
class Trace:
    """source: 'predicted' or 'measured'. Times count from the start of the step. memory: by time on each rank."""

    source: str
    events: tuple[Event, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    memory: tuple[MemorySample, ...] = ()

    @property
    def makespan_s(self) -> float:
        return max((event.end_s for event in self.events), default=0.0)

    def of_rank(self, rank: int) -> list[Event]:
        return [event for event in self.events if event.rank == rank]

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "meta": dict(self.meta),
            "events": [asdict(event) for event in self.events],
            "memory": [asdict(sample) for sample in self.memory],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Trace:
        return cls(
            document["source"],
            tuple(Event(**event) for event in document["events"]),
            document.get("meta", {}),
            tuple(MemorySample(**sample) for sample in document.get("memory", ())),
        )


def merge(traces: Iterable[Trace]) -> Trace:
    """Traces of single ranks, put into one."""
    parts = list(traces)
    events = sorted((event for part in parts for event in part.events), key=lambda event: (event.start_s, event.rank))
    meta: dict[str, Any] = {}
    for part in parts:
        meta.update(part.meta)
    memory = tuple(sample for part in parts for sample in part.memory)
    return Trace(parts[0].source if parts else "measured", tuple(events), meta, memory)


def busy_seconds(trace: Trace, rank: int, resource: str = COMPUTE) -> float:
    return sum(event.seconds for event in trace.events if event.rank == rank and event.resource == resource)


def mean_action_seconds(trace: Trace) -> dict[tuple[str, int], float]:
    """Mean duration of each (kind, stage): what a calibration compares between predicted and measured."""
    sums: dict[tuple[str, int], list[float]] = {}
    for event in trace.events:
        if event.resource == COMPUTE:
            sums.setdefault((event.kind, event.stage), []).append(event.seconds)
    return {key: sum(times) / len(times) for key, times in sums.items()}


def to_chrome(traces: Sequence[Trace]) -> dict[str, Any]:
    """Chrome and Perfetto format, one process for each (trace, rank): predicted and measured side by side."""
    rows: list[dict[str, Any]] = []
    for trace_index, trace in enumerate(traces):
        lanes: dict[tuple[int, str], int] = {}
        for event in trace.events:
            pid = event.rank * len(traces) + trace_index
            lane = lanes.get((event.rank, event.resource))
            if lane is None:
                if not any(rank == event.rank for rank, _ in lanes):
                    name = f"rank {event.rank} {trace.source}"
                    rows.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
                    rows.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
                lane = sum(rank == event.rank for rank, _ in lanes)
                lanes[event.rank, event.resource] = lane
                rows.append(
                    {"ph": "M", "name": "thread_name", "pid": pid, "tid": lane, "args": {"name": event.resource}}
                )
            row: dict[str, Any] = {
                "ph": "X",
                "name": event.label,
                "cat": event.resource,
                "pid": pid,
                "tid": lane,
                "ts": event.start_s * 1e6,
                "dur": event.seconds * 1e6,
                "args": {"stage": event.stage, "microbatch": event.microbatch, "kind": event.kind},
            }
            if event.kind in _COLOURS:
                row["cname"] = _COLOURS[event.kind]
            rows.append(row)
        rows += [_counter(sample, sample.rank * len(traces) + trace_index) for sample in trace.memory]
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def _counter(sample: MemorySample, pid: int) -> dict[str, Any]:
    """One track for each process, its kinds stacked. In MiB, as viewers print long numbers badly."""
    mib = {name: size / (1 << 20) for name, size in sample.items.items()}
    return {"ph": "C", "name": "memory (MiB)", "pid": pid, "ts": sample.at_s * 1e6, "args": mib}


def save_chrome(path: str | Path, traces: Sequence[Trace]) -> None:
    """A file that is there is never lost."""
    replace_text(Path(path), json.dumps(to_chrome(traces)))
