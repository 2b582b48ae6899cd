"""What happened in a step, as the simulator's own events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from ..costmodel.trace import COMPUTE, Event, MemorySample, Trace


class Recorder:
    """Times of this rank's actions. On an accelerator they are taken by events on its stream, without synchronizing.

    held: asked, where it is set, for the bytes by kind as each action begins and ends; it costs time."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.device, self.on_stream = device, device.type == "cuda"
        self.enabled = True
        self.held: Callable[[], Mapping[str, int]] | None = None
        self._held: list[tuple[float, Mapping[str, int]]] = []
        self._marks: list[tuple[str, str, int, int, float, float]] = []
        self._stream_marks: list[tuple[str, str, int, int, torch.cuda.Event, torch.cuda.Event]] = []
        self._start_s = 0.0
        self._start_event: torch.cuda.Event | None = None

    def begin(self) -> None:
        self._marks.clear()
        self._stream_marks.clear()
        self._held.clear()
        self._start_s = time.perf_counter()
        if self.on_stream and self.enabled:
            self._start_event = self._now()

    @contextmanager
    def action(self, kind: str, stage: int = -1, microbatch: int = -1, resource: str = COMPUTE) -> Iterator[None]:
        if not self.enabled:
            yield
        elif self.on_stream:
            self._sample()
            start = self._now()
            yield
            self._stream_marks.append((resource, kind, stage, microbatch, start, self._now()))
            self._sample()
        else:
            self._sample()
            start_s = time.perf_counter()
            yield
            self._marks.append((resource, kind, stage, microbatch, start_s, time.perf_counter()))
            self._sample()

    def _sample(self) -> None:
        """At the host's time: on an accelerator tensors are allocated as kernels are launched."""
        if self.held is not None:
            self._held.append((time.perf_counter(), dict(self.held())))

    def trace(self) -> Trace:
        """Events of the last step; times count from its start."""
        events = [
            Event(self.rank, resource, kind, stage, microbatch, start - self._start_s, end - self._start_s)
            for resource, kind, stage, microbatch, start, end in self._marks
        ]
        if self._stream_marks and self._start_event is not None:
            torch.cuda.synchronize(self.device)
            first = self._start_event
            for resource, kind, stage, microbatch, begin, stop in self._stream_marks:
                start_s, end_s = first.elapsed_time(begin) / 1e3, first.elapsed_time(stop) / 1e3
                events.append(Event(self.rank, resource, kind, stage, microbatch, start_s, end_s))
        memory = tuple(MemorySample(self.rank, at - self._start_s, items) for at, items in self._held)
        return Trace("measured", tuple(events), memory=memory)

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
