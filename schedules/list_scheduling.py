"""List scheduling: each rank, whenever it is free, starts the ready action of the earliest target.

Targets are times. Mostly they are a period apart from microbatch to microbatch: a periodic building block (Qi et al.,
Pipeline Parallelism with Controllable Memory, arXiv:2405.15362) that the list fits into what is really ready, in
warm-up and cool-down as in between. The result runs in the order in which it was built, so it is complete and free of
deadlock.

Memory never blocks: a forward starts only if, after it, the oldest microbatch that is not yet through the rank's
forwards could still finish them. Microbatches pass each stage in order, and one that has finished gives back all that
it held, so the next one can finish too.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ..costmodel.actions import Action
from .problem import PipelineProblem

INFINITE = float("inf")
_TIME_SLACK = 1e-9


@dataclass(frozen=True)
class Targets:
    """When each stage's F, I (or B) and W should start, by microbatch.

    patience: a rank waits for an action of an earlier target that is about to arrive, up to this share of the action
    that it could start instead.
    """

    forward_s: Sequence[Sequence[float]]  # [stage][microbatch]
    backward_s: Sequence[Sequence[float]]
    weight_s: Sequence[Sequence[float]]
    patience: float = 0.0

    @classmethod
    def periodic(
        cls,
        forward_s: Sequence[float],
        backward_s: Sequence[float],
        weight_s: Sequence[float],
        period_s: float,
        num_microbatches: int,
        patience: float = 0.0,
    ) -> Targets:
        """Of microbatch 0; each further one a period later."""
        shifts = [period_s * i for i in range(num_microbatches)]
        tables = ([[first + shift for shift in shifts] for first in row] for row in (forward_s, backward_s, weight_s))
        forwards, backwards, weights = tables
        return cls(forwards, backwards, weights, patience)


@dataclass(frozen=True)
class Lane:
    """One direction of a pipeline: the rank of each stage, and the microbatches that run through it."""

    stage_rank: tuple[int, ...]
    first_microbatch: int
    num_microbatches: int


@dataclass(frozen=True)
class Listing:
    """Actions of each rank in order, and when the last one ends."""

    ranks: list[list[Action]]
    makespan_s: float


def list_schedule(
    problem: PipelineProblem,
    targets: Targets | Sequence[Targets],
    *,
    fused: bool = False,
    lanes: Sequence[Lane] | None = None,
    give_up_s: float = INFINITE,
) -> Listing | None:
    """None where memory leaves no room for one microbatch, or where the makespan would exceed give_up_s.

    fused: B instead of I and W. lanes: directions (default: the problem's one), a Targets for each. Every lane has the
    problem's stages.
    """
    if lanes is None:
        lanes = [Lane(problem.stage_rank, 0, problem.num_microbatches)]
    each = [targets] * len(lanes) if isinstance(targets, Targets) else list(targets)
    state = _State(problem, lanes, each, fused)
    return state.run(give_up_s)


class _State:
    """Nodes are (lane, stage) pairs, numbered lane by lane: each has a queue of microbatches for F, for I and for W."""

    def __init__(
        self, problem: PipelineProblem, lanes: Sequence[Lane], targets: Sequence[Targets], fused: bool
    ) -> None:
        stages, num_stages = problem.stages, problem.num_stages
        self.fused, self.num_ranks = fused, problem.num_ranks
        self.lanes, self.num_stages = lanes, num_stages
        self.num_nodes = len(lanes) * num_stages
        self.rank = [rank for lane in lanes for rank in lane.stage_rank]
        self.count = [lane.num_microbatches for lane in lanes for _ in range(num_stages)]
        forward = [stage.forward_s for stage in stages]
        backward = [stage.backward_s if fused else stage.backward_input_s for stage in stages]
        weight = [stage.backward_weight_s for stage in stages]
        self.seconds = [seconds * len(lanes) for seconds in (forward, backward, weight)]
        self.bytes = [stage.activation_bytes for stage in stages] * len(lanes)
        self.limit = [limit * (1 + 1e-12) for limit in problem.memory_limit]
        self.local = [[n for n in range(self.num_nodes) if self.rank[n] == rank] for rank in range(self.num_ranks)]
        self.targets = [
            [value for one in targets for value in getattr(one, name)]
            for name in ("forward_s", "backward_s", "weight_s")
        ]
        self.patience = max(one.patience for one in targets)
        self.hop_on = [0.0] * self.num_nodes
        self.hop_back = [0.0] * self.num_nodes
        for node in range(self.num_nodes):
            stage = node % num_stages
            if stage < num_stages - 1 and self.rank[node] != self.rank[node + 1]:
                hop = problem.hops[stage]
                self.hop_on[node] = hop.forward_latency_s + hop.forward_occupancy_s
            if stage > 0 and self.rank[node] != self.rank[node - 1]:
                hop = problem.hops[stage - 1]
                self.hop_back[node] = hop.backward_latency_s + hop.backward_occupancy_s

    def run(self, give_up_s: float) -> Listing | None:
        num_nodes, last = self.num_nodes, self.num_stages - 1
        rank_of, count, local, fused = self.rank, self.count, self.local, self.fused
        seconds_of, sizes, limit = self.seconds, self.bytes, self.limit
        forward_target, backward_target, weight_target = self.targets
        patience, num_stages = self.patience, self.num_stages
        input_at = [[INFINITE] * count[node] for node in range(num_nodes)]
        gradient_at = [[INFINITE] * count[node] for node in range(num_nodes)]
        for node in range(0, num_nodes, num_stages):
            input_at[node] = [0.0] * count[node]
        forwards, backwards, weights = [0] * num_nodes, [0] * num_nodes, [0] * num_nodes
        used = [0.0] * self.num_ranks
        free = [0.0] * self.num_ranks
        built: list[list[int]] = [[] for _ in range(self.num_ranks)]
        events = [(0.0, rank) for rank in range(self.num_ranks)]
        left = sum(count) * (2 if fused else 3)
        claim = self._claim_alone if len(self.lanes) == 1 else self._claim_lanes

        while events:
            now, rank = heapq.heappop(events)
            if now < free[rank] - _TIME_SLACK:
                continue
            until = now + _TIME_SLACK
            best, best_target = -1, INFINITE
            next_arrival = INFINITE  # of anything that could run here
            soon, soon_target = INFINITE, INFINITE
            for node in local[rank]:
                i = backwards[node]
                if i < forwards[node]:
                    at = gradient_at[node][i]
                    if at < INFINITE:
                        target = backward_target[node][i]
                        if at <= until:
                            if target < best_target:
                                best, best_target = num_nodes + node, target
                        elif at < next_arrival:
                            next_arrival, soon, soon_target = at, at, target
                if not fused:
                    i = weights[node]
                    if i < backwards[node]:
                        target = weight_target[node][i]
                        if target < best_target:
                            best, best_target = 2 * num_nodes + node, target
                i = forwards[node]
                if i < count[node]:
                    at = input_at[node][i]
                    if at < INFINITE:
                        target = forward_target[node][i]
                        if at <= until and target >= best_target:
                            continue
                        if used[rank] + claim(node, i, forwards, local[rank]) <= limit[rank]:
                            if at <= until:
                                best, best_target = node, target
                            elif at < next_arrival:
                                next_arrival, soon, soon_target = at, at, target
            if best < 0:
                if next_arrival < INFINITE:
                    heapq.heappush(events, (next_arrival, rank))
                continue
            kind, node = divmod(best, num_nodes)
            seconds = seconds_of[kind][node]
            if soon < now + patience * seconds and soon_target < best_target:
                heapq.heappush(events, (soon, rank))
                continue
            end = now + seconds
            if end > give_up_s:
                return None
            free[rank] = end
            built[rank].append(best)
            left -= 1
            heapq.heappush(events, (end, rank))
            stage = node % num_stages
            if kind == 0:
                i = forwards[node]
                forwards[node] = i + 1
                used[rank] += sizes[node]
                if stage == last:
                    gradient_at[node][i] = end
                    continue
                at, other = end + self.hop_on[node], rank_of[node + 1]
                input_at[node + 1][i] = at
            elif kind == 1:
                i = backwards[node]
                backwards[node] = i + 1
                if fused:
                    used[rank] -= sizes[node]
                if stage == 0:
                    continue
                at, other = end + self.hop_back[node], rank_of[node - 1]
                gradient_at[node - 1][i] = at
            else:
                weights[node] += 1
                used[rank] -= sizes[node]
                continue
            if other != rank:
                heapq.heappush(events, (max(at, free[other]), other))
        if left:
            return None
        return Listing(self._actions(built), max(free))

    def _claim_alone(self, node: int, i: int, forwards: list[int], local: list[int]) -> float:
        """Bytes that must be free for this forward: its own, and what the oldest microbatch on the rank still needs."""
        sizes = self.bytes
        claim, oldest = sizes[node], i + 1
        for other in local:
            if other != node and forwards[other] < oldest:
                oldest = forwards[other]
        if oldest <= i:
            for other in local:
                if other != node and forwards[other] == oldest:
                    claim += sizes[other]
        return claim

    def _claim_lanes(self, node: int, i: int, forwards: list[int], local: list[int]) -> float:
        """The same where other lanes, that have begun a microbatch, keep room to finish theirs."""
        num_stages = self.num_stages
        lane = node // num_stages
        claim = self._claim_alone(node, i, forwards, [n for n in local if n // num_stages == lane])
        for key in range(len(self.lanes)):
            nodes = [n for n in local if n // num_stages == key]
            if key != lane and nodes:
                oldest, newest = min(forwards[n] for n in nodes), max(forwards[n] for n in nodes)
                if newest > oldest:
                    claim += sum(self.bytes[n] for n in nodes if forwards[n] == oldest)
        return claim

    def _actions(self, built: list[list[int]]) -> list[list[Action]]:
        num_nodes, num_stages = self.num_nodes, self.num_stages
        kinds = "FBW" if self.fused else "FIW"
        done = [0] * (3 * num_nodes)
        ranks = []
        for row in built:
            actions = []
            for code in row:
                kind, node = divmod(code, num_nodes)
                first = self.lanes[node // num_stages].first_microbatch
                actions.append(Action(kinds[kind], node % num_stages, first + done[code]))
                done[code] += 1
            ranks.append(actions)
        return ranks
