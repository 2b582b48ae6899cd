"""PipelineSchedule: virtual stages placed on ranks, and each rank's ordered list of actions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..costmodel.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    KINDS,
    LOAD,
    OFFLOAD,
    RECOMPUTE,
    Action,
    parse_action,
)
from ..costmodel.simulator import Pipeline, simulate
from ..costmodel.stage_times import NO_HOP, Hop, StageTimes, StepTimes, Tail
from ..costmodel.timeline import Timeline

SYNTHESIZED = "synthesized"  # the name of an order that no library has
SPARING = (RECOMPUTE, OFFLOAD, LOAD)  # actions that let activations go and bring them back


def loop_placement(num_ranks: int, num_chunks: int) -> tuple[int, ...]:
    """Stage s on rank s mod p: the interleaved placement of Narayanan et al., arXiv:2104.04473, section 2.2."""
    return tuple(stage % num_ranks for stage in range(num_ranks * num_chunks))


def v_placement(num_ranks: int, num_chunks: int = 2) -> tuple[int, ...]:
    """Down the ranks and up again: first and last stage share a rank (Qi et al., arXiv:2405.15362, section 3)."""
    down, up = list(range(num_ranks)), list(range(num_ranks - 1, -1, -1))
    return tuple(rank for chunk in range(num_chunks) for rank in (down if chunk % 2 == 0 else up))


@dataclass(frozen=True)
class PipelineSchedule:
    """stage_rank: the rank of each virtual stage. ranks: one list of actions for each rank, run strictly in order.

    Schedules of two directions place stages a second time in reverse_stage_rank; the microbatches from reverse_from to
    the last use it.
    """

    name: str
    num_microbatches: int
    stage_rank: tuple[int, ...]
    ranks: tuple[tuple[Action, ...], ...]
    reverse_stage_rank: tuple[int, ...] = ()
    reverse_from: int = -1

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        return len(self.stage_rank)

    @property
    def num_chunks(self) -> int:
        """Virtual stages of one direction on a rank."""
        return max(1, self.num_stages // max(1, self.num_ranks))

    @property
    def splits_backward(self) -> bool:
        return any(action.kind == BACKWARD_INPUT for actions in self.ranks for action in actions)

    def places(self, kind: str) -> frozenset[tuple[int, int]]:
        """(stage, microbatch) of all actions of one kind."""
        return frozenset((stage, i) for row in self.ranks for one, stage, i in row if one == kind)

    @property
    def is_forward_only(self) -> bool:
        return all(action.kind == FORWARD for actions in self.ranks for action in actions)

    @property
    def placements(self) -> list[tuple[int, ...]]:
        return [self.stage_rank, self.reverse_stage_rank] if self.reverse_stage_rank else [self.stage_rank]

    @property
    def direction(self) -> list[int]:
        """Row of `placements` that each microbatch uses."""
        if not self.reverse_stage_rank:
            return [0] * self.num_microbatches
        return [int(microbatch >= self.reverse_from) for microbatch in range(self.num_microbatches)]

    def rank_of(self, stage: int, microbatch: int) -> int:
        if self.reverse_stage_rank and microbatch >= self.reverse_from:
            return self.reverse_stage_rank[stage]
        return self.stage_rank[stage]

    def stages_of_rank(self, rank: int) -> list[int]:
        """Virtual stages whose parameters the rank holds, both directions."""
        return sorted({stage for row in self.placements for stage, place in enumerate(row) if place == rank})

    def check(self) -> None:
        """Complete, in place, each forward before its backward, and what is let go back in between; else ValueError."""
        seen: dict[tuple[str, int, int], int] = {}
        for rank, actions in enumerate(self.ranks):
            for index, action in enumerate(actions):
                kind, stage, microbatch = action
                if not (0 <= stage < self.num_stages and 0 <= microbatch < self.num_microbatches):
                    raise ValueError(f"{action} on rank {rank}: there are {self.num_stages} stages")
                if self.rank_of(stage, microbatch) != rank:
                    raise ValueError(f"{action} on rank {rank}: its stage is on rank {self.rank_of(stage, microbatch)}")
                if tuple(action) in seen:
                    raise ValueError(f"{action} twice on rank {rank}")
                seen[kind, stage, microbatch] = index
        forward_only = self.is_forward_only
        for stage in range(self.num_stages):
            for microbatch in range(self.num_microbatches):
                at = {kind: seen.get((kind, stage, microbatch)) for kind in KINDS}
                forward, fused, first, second = at["F"], at["B"], at["I"], at["W"]
                if forward is None:
                    raise ValueError(f"stage {stage} never runs microbatch {microbatch}")
                if forward_only:
                    continue
                if fused is not None and first is None and second is None:
                    ordered = forward < fused
                elif fused is None and first is not None and second is not None:
                    ordered = forward < first < second
                else:
                    raise ValueError(f"stage {stage} microbatch {microbatch}: needs one B, or one I and one W")
                if not ordered:
                    raise ValueError(f"stage {stage} microbatch {microbatch}: backward before forward")
                between = {kind: place for kind in SPARING if (place := at[kind]) is not None}
                if between and set(between) not in ({RECOMPUTE}, {OFFLOAD, LOAD}):
                    raise ValueError(f"stage {stage} microbatch {microbatch}: takes one R, or one O and one L")
                places = (forward, *between.values(), fused, first)
                if (in_turn := [place for place in places if place is not None]) != sorted(in_turn):
                    raise ValueError(f"stage {stage} microbatch {microbatch}: let go or brought back out of turn")

    def simulate(
        self,
        stages: Sequence[StageTimes],
        hops: Sequence[Hop] | Hop = NO_HOP,
        *,
        tails: Sequence[Tail] = (),
        wait_for_all: bool = False,
        with_events: bool = False,
        with_memory: bool = True,
    ) -> Timeline:
        """Run it; see costmodel/simulator.py. wait_for_all: no tail begins before every rank is done."""
        return simulate(
            Pipeline(self.ranks, self.placements, self.num_microbatches, self.direction),
            StepTimes(stages, hops, tails, wait_for_all),
            with_events=with_events,
            with_memory=with_memory,
        )

    def in_flight(self) -> dict[int, int]:
        """Most microbatches whose activations each virtual stage holds at once (on one rank, where it has two)."""
        most = dict.fromkeys(range(self.num_stages), 0)
        for actions in self.ranks:
            held = dict.fromkeys(range(self.num_stages), 0)
            for kind, stage, _ in actions:
                if kind == FORWARD:
                    held[stage] += 1
                    most[stage] = max(most[stage], held[stage])
                elif kind in (BACKWARD, BACKWARD_WEIGHT):
                    held[stage] -= 1
        return most

    def split_backward(self, name: str | None = None) -> PipelineSchedule:
        """The same order with every B as I then W at once: equal times, and a gradient that leaves a W earlier."""
        ranks = []
        for actions in self.ranks:
            row: list[Action] = []
            for action in actions:
                if action.kind == BACKWARD:
                    row.append(action._replace(kind=BACKWARD_INPUT))
                    row.append(action._replace(kind=BACKWARD_WEIGHT))
                else:
                    row.append(action)
            ranks.append(tuple(row))
        return PipelineSchedule(
            name or self.name,
            self.num_microbatches,
            self.stage_rank,
            tuple(ranks),
            self.reverse_stage_rank,
            self.reverse_from,
        )

    def to_judge(self) -> dict[str, Any]:
        """The plain JSON form: {"p", "m", "v", "stage_rank", "ranks": [["0F0", ...], ...]}; two directions also give
        "reverse_stage_rank" and "reverse_from". An F whose activations an R computes again is a list, ["F", stage,
        microbatch, 0, 0], the last for keeping none."""
        document: dict[str, Any] = {
            "p": self.num_ranks,
            "m": self.num_microbatches,
            "v": self.num_chunks,
            "stage_rank": list(self.stage_rank),
            "ranks": [_judged(actions) for actions in self.ranks],
        }
        if self.reverse_stage_rank:
            document |= {"reverse_stage_rank": list(self.reverse_stage_rank), "reverse_from": self.reverse_from}
        return document

    @classmethod
    def from_judge(cls, document: dict[str, Any], name: str = "custom") -> PipelineSchedule:
        ranks = tuple(
            tuple(parse_action(a) if isinstance(a, str) else _unjudged(a) for a in actions)
            for actions in document["ranks"]
        )
        reverse = tuple(document.get("reverse_stage_rank", ()))
        return cls(name, document["m"], tuple(document["stage_rank"]), ranks, reverse, document.get("reverse_from", -1))

    def to_json(self) -> str:
        return json.dumps(self.to_judge())

    def to_torch_csv(self) -> str:
        """One line for each rank, as `_PipelineScheduleRuntime._load_csv(format="compute_only")` of torch reads it.

        torch has no actions for recomputation and offloading, so these are left out.
        """
        lines = [",".join(str(a) for a in actions if a.kind not in SPARING) for actions in self.ranks]
        return "\n".join(lines) + "\n"


def _judged(actions: Sequence[Action]) -> list[Any]:
    again = {action[1:] for action in actions if action.kind == RECOMPUTE}
    return [[*a, 0, 0] if a.kind == FORWARD and a[1:] in again else str(a) for a in actions]


def _unjudged(entry: Sequence[Any]) -> Action:
    kind, stage, microbatch, *rest = entry
    if kind != FORWARD or rest != [0, 0]:
        raise ValueError(f'{entry!r} is not an F that keeps nothing: ["F", stage, microbatch, 0, 0]')
    return Action(kind, stage, microbatch)
