"""Activations that an order lets go and brings back: recomputed by an R, or copied to host memory and back.

An order for more memory than there is comes to fit by letting some activations go. Going along a rank's actions,
whenever memory runs out, that activation goes whose backward is furthest away: fewest go that way where all are alike
(Belady, A Study of Replacement Algorithms for a Virtual-Storage Computer, IBM Systems Journal 5(2), 1966). What is
offloaded is one whose copy should be over by then. It is computed again right before its backward, or loaded as far
ahead as memory allows; annealing then moves R, O and L to where they cost least.

Copies run beside compute, on two more rows of each rank: what its F made goes out (kind >), what L asks for comes in
(kind <), and the backward waits for that at a place of its own (kind =).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...costmodel.actions import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, LOAD, OFFLOAD, RECOMPUTE, Action
from ...costmodel.activation_memory import change
from ..graph import Order, OrderGraph
from ..problem import PipelineProblem

OUT, IN, WAIT = ">", "<", "="
Rows = Sequence[Sequence[Action]]
Place = tuple[int, int]  # stage, microbatch


class SparedGraph(OrderGraph):
    """Of one choice of what is recomputed and what is offloaded. Rows after the ranks': copies out, copies in."""

    kinds = "FIW" + RECOMPUTE + OFFLOAD + LOAD + WAIT + OUT + IN

    def __init__(self, problem: PipelineProblem, again: Iterable[Place], away: Iterable[Place]) -> None:
        super().__init__(problem)
        base, kinds = self.num_nodes, len(self.kinds)
        self.num_nodes = kinds * self.num_stages * self.m
        more = self.num_nodes - base
        stages, p = problem.stages, problem.num_ranks
        seconds = {
            RECOMPUTE: [stage.forward_s for stage in stages],
            OUT: [stage.offload_s for stage in stages],
            IN: [stage.offload_s for stage in stages],
        }
        nothing = [0.0] * self.num_stages
        self.seconds = self._spread(
            [stage.forward_s for stage in stages],
            [stage.backward_input_s for stage in stages],
            [stage.backward_weight_s for stage in stages],
            *(seconds.get(kind, nothing) for kind in self.kinds[3:]),
        )
        self.change = np.concatenate([self.change, np.zeros(more)])
        self.lag = np.concatenate([self.lag, np.zeros(more)])
        self.before = np.concatenate([self.before, np.full(more, -1)])
        self.own = np.full((self.num_nodes, 2), -1)
        self.after = np.concatenate([self.after, np.full((more, 2), -1)])
        beside = {OUT: p, IN: 2 * p}
        self.rank = self._spread(*([rank + beside.get(kind, 0) for rank in problem.stage_rank] for kind in self.kinds))
        self.limit = np.concatenate([self.limit, np.full(2 * p, 1e300)])
        for stage, microbatch in again:
            self._recompute(stage, microbatch)
        for stage, microbatch in away:
            self._offload(stage, microbatch)

    def _node(self, kind: str, stage: int, microbatch: int) -> int:
        return (self.kinds.index(kind) * self.num_stages + stage) * self.m + microbatch

    def _recompute(self, stage: int, microbatch: int) -> None:
        num_bytes = self.problem.stages[stage].recompute_bytes
        kinds = FORWARD, RECOMPUTE, BACKWARD_INPUT
        forward, again, backward = (self._node(kind, stage, microbatch) for kind in kinds)
        self.change[forward] -= num_bytes
        self.change[again] = num_bytes
        self.own[again, 0], self.own[backward, 0] = forward, again

    def _offload(self, stage: int, microbatch: int) -> None:
        num_bytes = self.problem.stages[stage].offload_bytes
        kinds = FORWARD, OUT, OFFLOAD, LOAD, IN, WAIT, BACKWARD_INPUT
        forward, out, let_go, load, back, wait, backward = (self._node(kind, stage, microbatch) for kind in kinds)
        self.change[let_go], self.change[load] = -num_bytes, num_bytes
        for one, other in ((forward, out), (out, let_go), (load, back), (back, wait)):
            self.before[other] = one
            self.after[one, self.after[one].argmin()] = other
        for one, other in ((forward, let_go), (let_go, load), (load, wait), (wait, backward)):
            self.own[other, 0] = one

    def frozen(self, order: Order) -> list[range]:
        p = self.problem.num_ranks
        return [range(0, len(row) if rank >= p else 0) for rank, row in enumerate(order)]

    def of_actions(self, ranks: Rows) -> Order:
        """With what runs beside them: copies out in the order of forwards, copies in in the order of L. From now on the
        graph knows no other order of these."""
        away = {action[1:] for row in ranks for action in row if action.kind == OFFLOAD}
        rows: list[list[Action]] = []
        for row in ranks:
            rows.append([])
            for action in row:
                if action.kind == BACKWARD_INPUT and action[1:] in away:
                    rows[-1].append(action._replace(kind=WAIT))
                rows[-1].append(action)
        for kind, beside in ((FORWARD, OUT), (LOAD, IN)):
            for row in ranks:
                copied = [a for a in row if a.kind == kind and a[1:] in away]
                rows.append([a._replace(kind=beside) for a in copied])
                for one, other in itertools.pairwise(copied):
                    self.own[self._node(*other), 1] = self._node(*one)
        return super().of_actions(rows)

    def actions(self, order: Order) -> list[list[Action]]:
        rows = super().actions(order)[: self.problem.num_ranks]
        return [[action for action in row if action.kind != WAIT] for row in rows]

    def justified(self, order: Order) -> None:
        """Justification knows of no actions that must come earlier."""


@dataclass(frozen=True)
class Sparing:
    """link_share: of the seconds of a rank's work, how many its copies out may take; what is beyond is recomputed.
    reserve: activations that copies back have room for ahead of their backwards. weights_first: rather than let one go,
    weight gradients that are left over run early. computes: may anything be recomputed?"""

    link_share: float = 0.0
    reserve: int = 0
    weights_first: bool = True
    computes: bool = True


def spared_order(
    problem: PipelineProblem, base: OrderGraph, order: Order, way: Sparing
) -> tuple[SparedGraph, Order] | None:
    """An order of `base`, for more memory than the problem's, made to fit. None where that cannot be."""
    starts = base.starts(order)
    chosen: list[list[Action]] = []
    for rank, (nodes, actions) in enumerate(zip(order, base.actions(order), strict=True)):
        row = _Row(problem, rank, actions, starts[nodes].tolist(), way).fitted()
        if row is None:
            return None
        chosen.append(row)
    again, away = ([a[1:] for row in chosen for a in row if a.kind == kind] for kind in (RECOMPUTE, OFFLOAD))
    graph = SparedGraph(problem, again, away)
    return graph, graph.of_actions(chosen)


def without_sparing(rows: Rows) -> list[list[Action]]:
    return [[action for action in row if action.kind in OrderGraph.kinds] for row in rows]


class _Row:
    """One rank's actions F, I and W, and when they start."""

    def __init__(
        self, problem: PipelineProblem, rank: int, row: Sequence[Action], starts: Sequence[float], way: Sparing
    ) -> None:
        self.stages, self.row, self.starts = problem.stages, row, starts
        self.limit = problem.memory_limit[rank] * (1 + 1e-12)
        own = problem.stages_of(rank)
        self.reserved = way.reserve * max((self.stages[stage].offload_bytes for stage in own), default=0)
        self.link_s = way.link_share * problem.num_microbatches * problem.work_s[rank]
        self.needed_at = {action[1:]: at for at, action in enumerate(row) if action.kind == BACKWARD_INPUT}
        self.copied_at: dict[Place, float] = {}  # when a copy out would be over, of what is kept between F and I
        self.again: set[Place] = set()
        self.away: set[Place] = set()
        self.pending: dict[Place, None] = {}  # weight gradients
        self.weights_first, self.computes = way.weights_first, way.computes
        self.inserted: dict[int, list[Action]] = {}  # before which action

    def fitted(self) -> list[Action] | None:
        held = 0.0
        for at, action in enumerate(self.row):
            place, stage = action[1:], self.stages[action.stage]
            if action.kind == BACKWARD_WEIGHT:
                if place in self.pending:
                    held -= stage.activation_bytes
                    del self.pending[place]
                continue
            if action.kind == FORWARD:
                held += stage.activation_bytes
                self.copied_at[place] = self.starts[at] + stage.forward_s + stage.offload_s
            else:
                self.copied_at.pop(place, None)
                held += stage.recompute_bytes * (place in self.again) + stage.offload_bytes * (place in self.away)
            limit = self.limit - (self.reserved if self.away else 0.0)
            while held > limit:
                freed = self._let_one_go(at, place)
                held -= freed
                if not freed:
                    break
            if held > self.limit:
                return None
            if action.kind == BACKWARD_INPUT:
                self.pending[place] = None
        return self._ahead(self._with_actions())

    def _let_one_go(self, at: int, now: Place) -> float:
        """Bytes freed before an action; 0: nothing may go."""
        stages, now_s = self.stages, self.starts[at]
        copied = [p for p in self.copied_at if p != now and 0.0 < stages[p[0]].offload_bytes]
        copied = [p for p in copied if stages[p[0]].offload_s <= self.link_s]
        over = [p for p in copied if self.copied_at[p] <= now_s]
        computed = [p for p in self.copied_at if self.computes and stages[p[0]].recompute_bytes]
        if self.pending and (self.weights_first or not (copied or computed)):
            first = next(iter(self.pending))
            del self.pending[first]
            self.inserted.setdefault(at, []).append(Action(BACKWARD_WEIGHT, *first))
            return stages[first[0]].activation_bytes
        if over or (copied and not computed):
            victim = max(over or copied, key=self.needed_at.__getitem__)
            self.link_s -= stages[victim[0]].offload_s
            self.away.add(victim)
            self.inserted.setdefault(at, []).append(Action(OFFLOAD, *victim))
        elif computed:
            victim = max(computed, key=self.needed_at.__getitem__)
            self.again.add(victim)
        else:
            return 0.0
        del self.copied_at[victim]
        stage = stages[victim[0]]
        return stage.offload_bytes if victim in self.away else stage.recompute_bytes

    def _with_actions(self) -> list[Action]:
        """What comes back does so right before its backward."""
        early = {action for actions in self.inserted.values() for action in actions}
        found: list[Action] = []
        for at, action in enumerate(self.row):
            found += self.inserted.get(at, ())
            if action.kind == BACKWARD_INPUT:
                found += [Action(RECOMPUTE, *action[1:])] * (action[1:] in self.again)
                found += [Action(LOAD, *action[1:])] * (action[1:] in self.away)
            if action not in early:
                found.append(action)
        return found

    def _ahead(self, row: list[Action]) -> list[Action]:
        """Each L as far ahead of its backward as its copy takes, where there is room."""
        held = self._held(row)
        seconds = [self._seconds(action) for action in row]
        for at in [at for at, action in enumerate(row) if action.kind == LOAD]:
            load, passed_s, to = row[at], 0.0, at
            num_bytes, wanted_s = self.stages[load.stage].offload_bytes, self.stages[load.stage].offload_s
            while passed_s < wanted_s:
                other = row[to - 1]  # there is always its own O
                if other.kind == LOAD or other == load._replace(kind=OFFLOAD):
                    break
                if max(held[to - 2 : to]) + num_bytes > self.limit:
                    break
                to -= 1
                passed_s += seconds[to]
            row.insert(to, row.pop(at))
            seconds.insert(to, seconds.pop(at))
            for k in range(at, to, -1):
                held[k] = held[k - 1] + num_bytes
            held[to] = held[to - 1] + num_bytes
        return row

    def _seconds(self, action: Action) -> float:
        stage = self.stages[action.stage]
        if action.kind == BACKWARD_INPUT:
            return stage.backward_input_s
        if action.kind == BACKWARD_WEIGHT:
            return stage.backward_weight_s
        return stage.forward_s if action.kind in (FORWARD, RECOMPUTE) else 0.0

    def _held(self, row: Sequence[Action]) -> list[float]:
        """After each action."""
        return list(itertools.accumulate(change(a.kind, self.stages[a.stage], a[1:] in self.again) for a in row))
