"""Bytes of each rank by kind over a step: a timeline, with what memory.py counts.

An activation is there from the start of its F to the end of its B or W, as activation_memory.py says; while an action
runs, so is what the rank holds beside activations in the pipeline (memory.RankMoments): gathered parameters, workspace
and, in a backward, gradients on their way. Gradients are there from the rank's first backward on. The optimizer step
has its own moment. So the peak of a rank is the plan's own figure: an order's most activations are let go by a B or W,
beside which all of that is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .activation_memory import change
from .memory import ITEMS, RankMoments
from .stage_times import StageTimes
from .timeline import Timeline
from .trace import Event, MemorySample

_GRADIENT_KINDS = "BW"  # actions that make gradients of parameters


@dataclass(frozen=True)
class Held:
    """The activation of one stage and microbatch, from forward to backward."""

    stage: int
    microbatch: int
    start_s: float
    end_s: float
    num_bytes: int


@dataclass(frozen=True)
class RankLedger:
    """samples[i] holds from its time to that of the next; the last is the state after the step."""

    rank: int
    samples: tuple[MemorySample, ...]
    activations: tuple[Held, ...] = ()

    @property
    def worst(self) -> MemorySample:
        return max(self.samples, key=lambda sample: sample.total_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.worst.total_bytes

    def peaks(self) -> dict[str, int]:
        """The most of each kind, whenever that is."""
        return {name: max(sample.items.get(name, 0) for sample in self.samples) for name in ITEMS}


def ledgers(timeline: Timeline, stages: Sequence[StageTimes], moments: Sequence[RankMoments]) -> list[RankLedger]:
    """moments: of each rank. The timeline has the events of its tails where it was simulated with events."""
    steps = {event.rank: event for event in timeline.extra if event.kind == "optimizer"}
    return [
        RankLedger(
            rank,
            tuple(_distinct(_samples(rank, timeline, stages, moments[rank], steps.get(rank)))),
            tuple(_held(rank, timeline, stages)),
        )
        for rank in range(len(timeline.ranks))
    ]


def _samples(
    rank: int, timeline: Timeline, stages: Sequence[StageTimes], moments: RankMoments, step: Event | None
) -> Iterator[MemorySample]:
    actions = timeline.ranks[rank]
    again = {(stage, microbatch) for kind, stage, microbatch in actions if kind == "R"}
    activations, gradients = 0, 0

    def sample(at_s: float, moment: Mapping[str, int]) -> MemorySample:
        return MemorySample(rank, at_s, moments.with_reserve({**moments.lasting, **moment}))

    yield sample(0.0, {})
    for (kind, stage, microbatch), start_s, end_s in zip(
        actions, timeline.starts[rank], timeline.ends[rank], strict=True
    ):
        changed = change(kind, stages[stage], (stage, microbatch) in again)
        activations += max(changed, 0)
        if kind in _GRADIENT_KINDS:
            gradients = moments.pipeline["gradients"]
        if kind in "OL":
            activations += min(changed, 0)
            yield sample(end_s, {"activations": activations, "gradients": gradients})
            continue
        beside = {**moments.pipeline, "activations": activations, "gradients": gradients}
        if kind not in _GRADIENT_KINDS:
            beside["gradient_buffers"] = 0
        yield sample(start_s, beside)
        activations += min(changed, 0)
        yield sample(end_s, {"activations": activations, "gradients": gradients})
    if step is not None:
        yield sample(step.start_s, moments.step)
        yield sample(step.end_s, {})


def _distinct(samples: Iterator[MemorySample]) -> Iterator[MemorySample]:
    """Of those at one time the last that lasts, but the greatest where none does."""
    last: MemorySample | None = None
    for sample in samples:
        if last is not None and sample.at_s > last.at_s:
            yield last
        elif last is not None and last.total_bytes > sample.total_bytes:
            yield last  # an action of no time still holds its bytes
        last = sample
    if last is not None:
        yield last


def _held(rank: int, timeline: Timeline, stages: Sequence[StageTimes]) -> Iterator[Held]:
    begun: dict[tuple[int, int], float] = {}
    rows = zip(timeline.ranks[rank], timeline.starts[rank], timeline.ends[rank], strict=True)
    for (kind, stage, microbatch), start_s, end_s in rows:
        if kind == "F":
            begun[stage, microbatch] = start_s
        elif kind in _GRADIENT_KINDS:
            yield Held(stage, microbatch, begun[stage, microbatch], end_s, stages[stage].activation_bytes)
