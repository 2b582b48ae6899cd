"""Timeline: when each action of a step ran, and what of it is worth knowing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .actions import Action
from .trace import COMPUTE, Event, Trace


@dataclass
class Timeline:
    """What the simulation found. Lists are indexed by rank; starts and ends run along the rank's list of actions."""

    ranks: Sequence[Sequence[Action]]
    starts: list[list[float]]
    ends: list[list[float]]
    makespan_s: float  # to the end of the last action, reduction and tail
    compute_end_s: list[float]  # end of each rank's last action
    busy_s: list[float]  # sum of the action durations
    exposed_comm_s: list[float]  # collectives that the rank waited for: inside actions, reductions left, the tail's
    peak_bytes: list[int]
    peak_in_flight: list[int]  # most microbatch activations (of single virtual stages) held at once
    extra: list[Event] = field(default_factory=list)  # transfers, collectives and tails, where events were asked for

    @property
    def compute_makespan_s(self) -> float:
        return max(self.compute_end_s, default=0.0)

    @property
    def bubble_fractions(self) -> list[float]:
        """Share of each rank's time, to the end of the last action anywhere, without an action."""
        span = self.compute_makespan_s
        return [(span - seconds) / span if span else 0.0 for seconds in self.busy_s]

    @property
    def bubble_fraction(self) -> float:
        """Mean idle share over the ranks: (p-1)/(m+p-1) for 1F1B with equal stages."""
        fractions = self.bubble_fractions
        return sum(fractions) / len(fractions) if fractions else 0.0

    def events(self) -> Iterator[Event]:
        for rank, actions in enumerate(self.ranks):
            for action, start, end in zip(actions, self.starts[rank], self.ends[rank], strict=True):
                yield Event(rank, COMPUTE, action.kind, action.stage, action.microbatch, start, end)
        yield from self.extra

    def trace(self, **meta: object) -> Trace:
        events = sorted(self.events(), key=lambda event: (event.start_s, event.rank))
        return Trace("predicted", tuple(events), meta)
